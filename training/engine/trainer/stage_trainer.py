"""The trainer of every stage: exact resume, complete checkpoints, a stop before a broken update, one log and validation.

Every random draw of a micro-batch (dropout, noise) comes from a generator seeded by the run's seed and the
micro-batch's number alone. So a run that resumes from a checkpoint, on any number of processes, draws what it would have
drawn, and no state of random generators has to be saved.
"""

import abc
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback, TrainerState

from blipren.training.engine import checkpoints
from blipren.training.engine.fsdp import full_tensor, shard_like
from blipren.training.engine.optimizer import Average, MuonWithAdamW
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trainer.callbacks import Averaging, Interrupts, Progress, StepClock
from blipren.training.engine.trainer.transformers_overrides import TrainerOverrides
from blipren.training.errors import UserError

WEIGHTS = "trained.safetensors"
AVERAGE = "average.safetensors"
STATE = "trainer_state.json"
EARLY_STOP = "EarlyStoppingCallback"
SECONDS_BETWEEN_CURVES = 60


def first(items: list[dict]) -> dict:
    """Return the one item: the datasets give finished micro-batches, so nothing is left to collate."""
    return items[0]


def seed_of(run_seed: int, item: int) -> int:
    """Return a seed for micro-batch `item`, far from those of its neighbours (the finalizer of SplitMix64)."""
    value = (run_seed * 0x9E3779B97F4A7C15 + item + 1) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) >> 1


class StageTrainer(TrainerOverrides, abc.ABC):
    """Trainer over finished micro-batches: dicts with `item` (their number in the run) and `ids` (of their images).

    A stage writes `compute_loss`, whose loss is already divided by what `count_step` counted over all processes, and
    the abstract methods. `run_stage` calls `begin`, `summary` and `write_model`.

    Args:
        run: folder of the run.
        average: average of the weights, which is validated and kept in their place; None for none.
        groups: the optimizer's parameter groups, each with its learning rate and weight decay.
        betas: of AdamW.
        keywords: of transformers' Trainer.
    """

    def __init__(self, *, run: RunFolder, average: Average | None = None, groups: list[dict], betas, **keywords):
        super().__init__(**keywords)
        self.run_folder, self.average, self.groups, self.betas = run, average, groups, betas
        self.interrupted = False
        self.clock = StepClock()
        self.curves_drawn = time.perf_counter()
        self._pending: list[tuple[torch.Tensor, list[str]]] = []
        self.pop_callback(PrinterCallback)
        self.pop_callback(ProgressCallback)
        self.progress = Progress()
        self.add_callback(self.progress)
        self.add_callback(Interrupts(self))
        if average is not None:
            self.add_callback(Averaging(average))

    # ---- what a stage writes --------------------------------------------------------------------------------------

    @abc.abstractmethod
    def count_step(self, batches: list[dict]) -> torch.Tensor:
        """Return what the micro-batches of this process add to the counts of a step, such as [answer tokens, images]."""

    @abc.abstractmethod
    def log_values(self, logs: dict[str, float]) -> dict[str, float]:
        """Return the values of a log line, from the Trainer's `loss`, `grad_norm` and `learning_rate`."""

    @abc.abstractmethod
    def log_line(self, values: dict[str, float]) -> str:
        """Return the text of a log line."""

    @abc.abstractmethod
    def validate(self) -> dict[str, float]:
        """Return the metrics of the validation split. Every process calls it."""

    @abc.abstractmethod
    def begin(self, resumed: bool) -> None:
        """Do what comes before the first step of this process."""

    @abc.abstractmethod
    def summary(self, best_step: int | None) -> dict:
        """Return the summary of the finished run. `best_step` is None when the last weights are kept."""

    @abc.abstractmethod
    def write_model(self, folder: Path) -> None:
        """Write the finished model and its processor. Every process calls it, the first one writes."""

    @abc.abstractmethod
    def summary_lines(self, summary: dict) -> list[str]:
        """Return lines that say what came out."""

    # ---- batches and optimizer ------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.train_dataset,
            batch_size=1,
            sampler=SequentialSampler(self.train_dataset),
            collate_fn=first,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            pin_memory=self.args.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind = MuonWithAdamW if any(group.get("muon") for group in self.groups) else torch.optim.AdamW
            self.optimizer = kind(self.groups, betas=tuple(self.betas), eps=self.args.adam_epsilon)
        return self.optimizer

    def floating_point_ops(self, inputs) -> int:
        return 0  # the log line has its own count

    # ---- the step -------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        torch.manual_seed(seed_of(self.args.seed, inputs["item"]))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._pending.append((loss, inputs["ids"]))
        return loss

    def check_step(self, grad_norm) -> None:
        """Stop the run before the optimizer's step where a loss or gradient is not finite: one synchronization a step.

        Raises:
            UserError: with the images of the batch.
        """
        pending, self._pending = self._pending, []
        losses = torch.stack([loss for loss, _ in pending])
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16 skips such steps by itself
        norm_ok = scaled or grad_norm is None or math.isfinite(float(grad_norm))
        if norm_ok and bool(torch.isfinite(losses).all()):
            return
        broken = [ids for (_, ids), ok in zip(pending, torch.isfinite(losses).tolist()) if not ok]
        what = "loss" if broken else "gradient"
        named = list(dict.fromkeys(i for ids in broken or [ids for _, ids in pending] for i in ids))
        raise UserError(
            f"{what} is not finite at step {self.state.global_step + 1}: stopped before the update; images of the "
            f"batch: {', '.join(named)}. Look at them, or lower the learning rate; the last checkpoint is unharmed"
        )

    # ---- log and validation ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a log line: to the trackers, to log.jsonl, and to the screen."""
        if "learning_rate" in logs:  # the others are validations and the Trainer's summary
            logs = self.log_values(logs)
            self.run_folder.log("train", self.state.global_step, **logs)
            if self.args.should_save:
                self.progress.print_line(self.log_line(logs))
                if "images_per_second" in logs:
                    self.progress.show(
                        f"{logs['images_per_second']:.1f} images/s, {logs['tokens_per_second']:,.0f} tokens/s"
                    )
        super().log(dict(logs), start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Validate the weights that are kept: their average where there is one."""
        step, began = self.state.global_step, time.perf_counter()
        with self.clock, self.average.in_place() if self.average is not None else nullcontext():
            metrics = self.validate()
            self.run_folder.log("validation", step, **metrics)
            if began - self.curves_drawn > SECONDS_BETWEEN_CURVES:
                self.run_folder.draw_curves()
                self.curves_drawn = began
        if self.args.should_save:
            text = "  ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in metrics.items()
            )
            self.progress.print_line(f"validation at step {step}: {text}  ({time.perf_counter() - began:.1f} s)")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights by name, unsharded and on the CPU; every process must call it."""
        return {
            n: full_tensor(p.detach()).contiguous().cpu() for n, p in self.model.named_parameters() if p.requires_grad
        }

    def kept_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that are validated and kept: the average where there is one."""
        return self.average.full_weights() if self.average is not None else self.trained_weights()

    def load_trained_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load trained weights by name.

        Raises:
            UserError: a weight is in one of run and `weights` alone.
        """
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if differing := sorted(set(trained) ^ set(weights)):
            raise UserError(f"the checkpoint trains other weights than this run, such as {differing[0]}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(shard_like(weights[name], parameter))

    def write_checkpoint(self) -> None:
        """Write the checkpoint of this step, and remove those that are not kept any more."""
        with self.clock:
            folder = self.run_folder.checkpoints / f"checkpoint-{self.state.global_step}"
            staging = checkpoints.staging_folder(folder)
            if self.args.should_save:
                checkpoints.open_staging(folder)
            self.accelerator.wait_for_everyone()
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            weights = self.trained_weights()
            average = self.average.full_weights() if self.average is not None else None
            if self.args.should_save:
                save_file(weights, staging / WEIGHTS)
                if average is not None:
                    save_file(average, staging / AVERAGE)
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(callback, ExportableState):
                        self.state.stateful_callbacks[type(callback).__name__] = callback.state()
                self.state.save_to_json(str(staging / STATE))
                checkpoints.publish_staging(folder)
                checkpoints.prune(self.run_folder.checkpoints, self.args.save_total_limit)
                self._remove_unneeded_best()
            self.accelerator.wait_for_everyone()

    def _remove_unneeded_best(self) -> None:
        """Remove the best models that neither this run nor a checkpoint of it names."""
        named = [self.state.best_global_step]
        for kept in checkpoints.list_checkpoints(self.run_folder.checkpoints):
            if (kept / STATE).is_file():  # a damaged one names none
                named.append(TrainerState.load_from_json(str(kept / STATE)).best_global_step)
        for best in checkpoints.list_checkpoints(self.run_folder.checkpoints, "best"):
            if checkpoints.step_of(best) not in named:
                checkpoints.remove(best)

    def write_best(self) -> None:
        """Write the kept weights as the best model so far."""
        weights = self.kept_weights()
        if self.args.should_save:
            folder = self.run_folder.checkpoints / f"best-{self.state.global_step}"
            with checkpoints.complete_or_absent(folder) as staging:
                save_file(weights, staging / WEIGHTS)

    def load_checkpoint(self, folder: Path) -> None:
        """Load the weights, and their average, of a checkpoint."""
        self.load_trained_weights(load_file(folder / WEIGHTS))
        if self.average is not None:
            for name, tensor in load_file(folder / AVERAGE).items():
                self.average.weights[name].copy_(shard_like(tensor, self.average.weights[name]))
            self.average.updates = json.loads((folder / STATE).read_text())["global_step"]

    def restore(self, folder: Path) -> None:
        """Load weights and state of a checkpoint after which nothing is left to train."""
        self.load_checkpoint(folder)
        self.state = TrainerState.load_from_json(str(folder / STATE))

    def load_best(self) -> int | None:
        """Load the best model's weights. Returns its step, or None when the last weights are kept."""
        step = self.state.best_global_step if self.args.metric_for_best_model else None
        if step:
            folder = self.run_folder.checkpoints / f"best-{step}"
            if reason := checkpoints.damage(folder):
                raise UserError(f"the best model, {folder}, is damaged: {reason}")
            self.load_trained_weights(load_file(folder / WEIGHTS))
        elif self.average is not None:
            self.load_trained_weights(self.average.full_weights())
        return step or None


def stopped_early(checkpoint: Path) -> bool:
    """Return whether the run that wrote this checkpoint had used up its patience."""
    state = json.loads((checkpoint / STATE).read_text())["stateful_callbacks"].get(EARLY_STOP)
    return bool(state) and (
        state["attributes"]["early_stopping_patience_counter"] >= state["args"]["early_stopping_patience"]
    )
