"""Every private method of transformers' Trainer that is overridden, each with the reason why no public way does it.

A private method may be renamed or get other arguments in any version: `tests/engine/test_overrides.py` compares each
with the installed Trainer. Subclasses write the public methods that are called from here.
"""

import contextlib
from pathlib import Path

import torch
from transformers import Trainer

from blipren.training.engine import deepspeed as zero
from blipren.training.engine.fsdp import full_tensor, is_sharded, load_optimizer_state, optimizer_state


class TrainerOverrides(Trainer):
    """Trainer whose private steps call public methods of a subclass."""

    def __init__(self, **keywords):
        # The Trainer refuses to write checkpoints of a model that shards itself, unless it writes the model alone.
        # What a checkpoint holds is decided in `write_checkpoint`.
        keywords["args"].save_only_model = is_sharded(keywords["model"])
        super().__init__(**keywords)
        # Several GPUs are for torchrun. Without this, one process with several GPUs wraps the model in DataParallel.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        # compute_loss divides by the counts of the whole step, so the Trainer must not divide by the accumulation
        self.loss_is_scaled_for_ga = True

    # ---- the step -------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        # The Trainer counts `labels` alone, and only where the model's forward takes the count.
        counts = self.count_step(batch_samples).to(device)
        return self.accelerator.reduce(counts, "sum") if self.accelerator.num_processes > 1 else counts

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self):
        # The Trainer asks the `distributed_config` of a model that transformers has sharded; `shard` does it here.
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def _get_grad_norm(self, model, grad_norm=None):
        # The one place between backward and the optimizer's step that knows the norm: no callback gets it.
        norm = full_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))
        self.check_step(norm)
        return norm

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        # The Trainer writes into the final folder, so that a killed process leaves a half-written checkpoint there, and
        # resuming takes the one with the highest number, complete or not.
        self.write_checkpoint()

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        # A callback does not learn that a metric is the best so far; load_best_model_at_end needs every checkpoint to
        # be at a validation.
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.write_best()
        self.accelerator.wait_for_everyone()
        return is_best

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        # Checkpoints hold the trained weights alone, in a file of another name.
        self.load_checkpoint(Path(resume_from_checkpoint))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # With DeepSpeed the Trainer looks for a checkpoint in DeepSpeed's own format. Ours is the same with and without
        # DeepSpeed: weights go in before the engine copies them, the optimizer's state after.
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        # The Trainer writes sharded and DeepSpeed states in formats of their own, bound to the number of processes.
        state = zero.optimizer_state(self.deepspeed) if self.is_deepspeed_enabled else optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        # The counterpart. The Trainer passes silently over a checkpoint without the files.
        if checkpoint is not None:
            read = {"map_location": "cpu", "weights_only": True}
            state = torch.load(Path(checkpoint) / "optimizer.pt", **read)
            if self.is_deepspeed_enabled:
                zero.load_optimizer_state(self.deepspeed, state)
            else:
                load_optimizer_state(self.optimizer, state)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", **read))

    def _load_rng_state(self, checkpoint) -> None:
        # Every micro-batch seeds its own draws (`StageTrainer.training_step`): there is no state to load, and the
        # Trainer's files of it depend on the number of processes.
        return
