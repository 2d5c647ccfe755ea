"""The course of every stage's run: start or resume, train, load the best model, write it."""

import os
from collections.abc import Callable

from blipren.training.console import print_line
from blipren.training.engine import checkpoints
from blipren.training.engine.deepspeed import refuse_foreign_launch
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.settings import CheckpointSettings
from blipren.training.engine.trainer.stage_trainer import StageTrainer, stopped_early


def process_count() -> int:
    """Return the number of processes that torchrun started; nothing is distributed yet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def run_stage(
    settings: CheckpointSettings, build_trainer: Callable[[CheckpointSettings, RunFolder], StageTrainer]
) -> int:
    """Train a stage, or resume its run; write the finished model into the run's folder, and publish it if asked to.

    Args:
        settings: the stage's.
        build_trainer: makes model, batches and trainer. It calls `run.claim` when everything else is known to be right.

    Returns:
        0 when the model is written, 130 when the run was interrupted and saved.

    Raises:
        UserError: the folder holds a run with other settings, or something else.
    """
    refuse_foreign_launch()
    run = RunFolder(settings.out, writes=int(os.environ.get("RANK", 0)) == 0)
    run.check(settings)
    if summary := run.finished():
        print_line(f"{run.path} is finished: {summary['steps']} steps; the model is in {run.path}")
        publish_finished(run, settings)
        return 0

    trainer = build_trainer(settings, run)
    checkpoint, damaged = checkpoints.newest_verified(run.checkpoints)
    if run.writes:
        for bad in damaged:
            print_line(f"skipped a damaged checkpoint, {bad}")
        if checkpoint is not None:
            print_line(f"resuming from {checkpoint}")
    run.rewind(checkpoints.step_of(checkpoint) if checkpoint is not None else -1)

    trainer.begin(resumed=checkpoint is not None)
    if checkpoint is not None and stopped_early(checkpoint):
        trainer.restore(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if trainer.interrupted:
        print_line(f"interrupted: saved at step {trainer.state.global_step}; run the same command again to resume")
        return 130

    summary = trainer.summary(trainer.load_best())
    trainer.write_model(run.path)
    run.draw_curves()
    run.finish(summary)
    if run.writes:
        for line in trainer.summary_lines(summary):
            print_line(line)
    publish_finished(run, settings)
    return 0


def publish_finished(run: RunFolder, settings: CheckpointSettings) -> None:
    """Publish the finished model where the settings name a repository. What the Hub has already is not sent again."""
    if settings.push_to is not None and run.writes:
        from blipren.training.hub.publish import publish_run  # here: training alone needs no Hub client

        publish_run(run.path, settings.push_to, private=not settings.public)
