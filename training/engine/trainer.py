"""transformers' Trainer, made safe to interrupt: complete checkpoints, exact resume, a stop before a broken update.

Every random draw of a micro-batch (dropout, noise) comes from a generator seeded by the run's seed and the
micro-batch's number alone. So a run that goes on from a checkpoint, on however many processes, draws what it would
have drawn, and no state of random generators has to survive.
"""

import abc
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, SequentialSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback, TrainerState

from blipren.training.console import print_line
from blipren.training.engine import checkpoints
from blipren.training.engine import deepspeed as zero
from blipren.training.engine.fsdp import full_tensor, is_sharded, load_optimizer_state, optimizer_state, shard_like
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trained_parts import Average
from blipren.training.errors import UserError

WEIGHTS = "trained.safetensors"
AVERAGE = "average.safetensors"
STATE = "trainer_state.json"
EARLY_STOP = "EarlyStoppingCallback"


def first(items: list[dict]) -> dict:
    """The datasets give finished micro-batches, one an item: nothing is left to collate."""
    return items[0]


def seed_of(run_seed: int, item: int) -> int:
    """A seed for micro-batch `item`, far from those of its neighbours (the finalizer of SplitMix64)."""
    value = (run_seed * 0x9E3779B97F4A7C15 + item + 1) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) >> 1


class StageTrainer(Trainer, abc.ABC):
    """Trainer over finished micro-batches: dicts with `item` (their number in the run) and `ids` (of their images).

    A subclass writes `compute_loss`, whose loss is already divided by what `count_step` counted over all processes.
    """

    def __init__(self, *, run: RunFolder, average: Average | None = None, groups: list[dict], betas, **keywords):
        # the Trainer does not know how to checkpoint a model that shards itself, and would refuse; this class does
        keywords["args"].save_only_model = is_sharded(keywords["model"])
        super().__init__(**keywords)
        self.run_folder, self.average, self.groups, self.betas = run, average, groups, betas
        self.args._n_gpu = min(self.args.n_gpu, 1)  # several GPUs are for torchrun, never for DataParallel
        self.loss_is_scaled_for_ga = True
        self.interrupted = False
        self.clock = StepClock()
        self._pending: list[tuple[torch.Tensor, list[str]]] = []
        self.pop_callback(PrinterCallback)
        self.pop_callback(ProgressCallback)
        self.progress = Progress()
        self.add_callback(self.progress)
        self.add_callback(Interrupts(self))
        if average is not None:
            self.add_callback(Averaging(average))

    # ---- batches --------------------------------------------------------------------------------------------------

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

    @abc.abstractmethod
    def count_step(self, batches: list[dict]) -> torch.Tensor:
        """What the micro-batches of this process add to the counts of a step, such as [answer tokens, images]."""

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        counts = self.count_step(batch_samples).to(device)
        return self.accelerator.reduce(counts, "sum") if self.accelerator.num_processes > 1 else counts

    def floating_point_ops(self, inputs) -> int:
        return 0  # the log line has its own count

    # ---- the step, and what guards it -----------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        torch.manual_seed(seed_of(self.args.seed, inputs["item"]))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._pending.append((loss, inputs["ids"]))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = full_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))
        self._refuse_broken_step(norm)
        return norm

    def _refuse_broken_step(self, grad_norm) -> None:
        """Runs right before the optimizer steps; one synchronisation with the device a step."""
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

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.groups, betas=tuple(self.betas), eps=self.args.adam_epsilon)
        return self.optimizer

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """By name, whole and on the CPU; every process must call it."""
        return {
            n: full_tensor(p.detach()).contiguous().cpu() for n, p in self.model.named_parameters() if p.requires_grad
        }

    def load_trained_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Raises `UserError` naming a weight that is there and not here, or the other way round."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if differing := sorted(set(trained) ^ set(weights)):
            raise UserError(f"the checkpoint trains other weights than this run, such as {differing[0]}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(shard_like(weights[name], parameter))

    def _save_checkpoint(self, model, trial) -> None:
        with self.clock:
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
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
            # an older best goes once no checkpoint speaks of it any more
            spoken_of = [self.state.best_global_step]
            for kept in checkpoints.list_checkpoints(self.run_folder.checkpoints):
                if (kept / STATE).is_file():  # one that is damaged speaks of nothing
                    spoken_of.append(TrainerState.load_from_json(str(kept / STATE)).best_global_step)
            for best in checkpoints.list_checkpoints(self.run_folder.checkpoints, "best"):
                if checkpoints.step_of(best) not in spoken_of:
                    checkpoints.remove(best)
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics, trial) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        weights = self.chosen_weights() if is_best else None
        if is_best and self.args.should_save:
            with checkpoints.complete_or_absent(
                self.run_folder.checkpoints / f"best-{self.state.global_step}"
            ) as staging:
                save_file(weights, staging / WEIGHTS)
        self.accelerator.wait_for_everyone()
        return is_best

    def chosen_weights(self) -> dict[str, torch.Tensor]:
        """What is validated and kept: the average of the weights where there is one."""
        return self.average.full_weights() if self.average is not None else self.trained_weights()

    def load_best(self) -> int | None:
        """Puts the best model's weights in place. Returns its step, or None when the last weights are kept."""
        step = self.state.best_global_step if self.args.metric_for_best_model else None
        if step:
            folder = self.run_folder.checkpoints / f"best-{step}"
            if reason := checkpoints.damage(folder):
                raise UserError(f"the best model, {folder}, is damaged: {reason}")
            self.load_trained_weights(load_file(folder / WEIGHTS))
        elif self.average is not None:
            self.load_trained_weights(self.average.full_weights())
        return step or None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        self.load_trained_weights(load_file(folder / WEIGHTS))
        if self.average is not None:
            for name, tensor in load_file(folder / AVERAGE).items():
                self.average.weights[name].copy_(shard_like(tensor, self.average.weights[name]))
            self.average.updates = json.loads((folder / STATE).read_text())["global_step"]

    def restore(self, checkpoint: Path) -> None:
        """Weights and state of a checkpoint, where there is nothing left to train."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # the Trainer would look for a checkpoint of DeepSpeed's own; its engine copies the weights that it finds
        self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        state = zero.optimizer_state(self.deepspeed) if self.is_deepspeed_enabled else optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is not None:
            read = {"map_location": "cpu", "weights_only": True}
            state = torch.load(Path(checkpoint) / "optimizer.pt", **read)
            if self.is_deepspeed_enabled:
                zero.load_optimizer_state(self.deepspeed, state)
            else:
                load_optimizer_state(self.optimizer, state)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", **read))

    def _load_rng_state(self, checkpoint) -> None:
        return  # see the head of this file

    # ---- publishing -----------------------------------------------------------------------------------------------

    def push_to_hub(self, commit_message: str | None = None, token: str | None = None, **_) -> str:
        """Publish the finished run folder as `blipren push` does, and return the commit.

        transformers' own method would send everything in the folder, the pickled `training_args.bin` among it.

        Raises:
            UserError: `hub_model_id` is not in the training arguments, or the Hub refuses.
        """
        from blipren.training.hub.publish import publish_run  # here: training needs no Hub client

        if not self.args.hub_model_id:
            raise UserError("push_to_hub needs hub_model_id (user/name) in the training arguments")
        return publish_run(self.run_folder.path, self.args.hub_model_id, private=bool(self.args.hub_private_repo))


def stopped_early(checkpoint: Path) -> bool:
    """Whether the run that wrote this checkpoint had lost its patience."""
    state = json.loads((checkpoint / STATE).read_text())["stateful_callbacks"].get(EARLY_STOP)
    return bool(state) and (
        state["attributes"]["early_stopping_patience_counter"] >= state["args"]["early_stopping_patience"]
    )


class Progress(TrainerCallback):
    """A bar with speed and time left, where there is a terminal to draw it on; log lines go above it."""

    bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **keywords):
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **keywords):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **keywords):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def show(self, speed: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(speed)

    def print_line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        else:
            print_line(text)


class Averaging(TrainerCallback):
    """Updates the average of the weights behind every step."""

    def __init__(self, average: Average):
        self.average = average

    def on_step_end(self, args, state, control, **keywords):
        self.average.update()


class Interrupts(TrainerCallback):
    """Ctrl-C and SIGTERM end training behind the step under way, with a checkpoint; a second Ctrl-C ends at once."""

    def __init__(self, trainer: StageTrainer):
        self.trainer, self.previous = trainer, {}

    def _asked(self, number, frame) -> None:
        if self.trainer.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.trainer.interrupted = True

    def on_train_begin(self, args, state, control, **keywords):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._asked)

    def on_train_end(self, args, state, control, **keywords):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args, state, control, **keywords):
        asked = self.trainer.interrupted
        if args.world_size > 1:  # all processes stop at the same step
            asked = bool(self.trainer.accelerator.reduce(torch.tensor(float(asked), device=args.device), "sum").item())
        if asked:
            self.trainer.interrupted = True
            control.should_save = control.should_training_stop = True


class StepClock:
    """Time spent in steps, that of validation, samples and checkpoints left out."""

    def __init__(self):
        self.began, self.aside = time.perf_counter(), 0.0

    def reset(self) -> None:
        self.began, self.aside = time.perf_counter(), 0.0

    def elapsed(self) -> float:
        return time.perf_counter() - self.began - self.aside

    def __enter__(self) -> "StepClock":
        """What happens inside the block is not step time."""
        self._paused = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        self.aside += time.perf_counter() - self._paused


def clock_text(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def training_arguments(settings, run: RunFolder, max_steps: int, accumulation: int, **changes) -> TrainingArguments:
    """The settings as transformers' TrainingArguments; step means optimizer update in both."""
    every = changes.pop("eval_steps")
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * max_steps
    schedule = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": settings.min_learning_rate}),
        "linear": ("linear", {}),
        "constant": ("constant_with_warmup", {}),
    }[settings.schedule]
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_steps=max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=schedule[0],
        lr_scheduler_kwargs=schedule[1],
        warmup_steps=round(warmup),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=settings.save_every or every or max_steps,
        save_total_limit=settings.keep_checkpoints,
        report_to=settings.report_to or "none",
        seed=settings.seed,
        dataloader_num_workers=settings.workers,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["targets"],
        restore_callback_states_from_checkpoint=True,
        ignore_data_skip=False,
        **changes,
    )
