"""Callbacks of every stage: the bar, the average of the weights, interrupts, limited time; and the clock of steps."""

import signal
import sys
import time

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from blipren.training.console import print_line
from blipren.training.engine.optimizer import Average
from blipren.training.objectives.gathering import global_count


class Progress(TrainerCallback):
    """Draw a bar with speed and time left where there is a terminal; log lines go above it."""

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
        """Show the speed behind the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(speed)

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print_line(text)


class Averaging(TrainerCallback):
    """Update the average of the weights after every step."""

    def __init__(self, average: Average):
        self.average = average

    def on_step_end(self, args, state, control, **keywords):
        self.average.update()


class Interrupts(TrainerCallback):
    """End training with a checkpoint after the current step on Ctrl-C or SIGTERM; end at once on a second Ctrl-C."""

    def __init__(self, trainer: Trainer):
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


class TimeLimit(TrainerCallback):
    """Measure the time of a run, that of its earlier processes included, and end the run when it reaches a limit.

    Args:
        minutes: the limit; None measures alone.
    """

    def __init__(self, minutes: float | None = None):
        self.limit = None if minutes is None else 60 * minutes
        self.before, self.began = 0.0, time.perf_counter()

    def elapsed(self) -> float:
        """Return the seconds of the run, validations and checkpoints included."""
        return self.before + time.perf_counter() - self.began

    def share(self) -> float:
        """Return the share of the limit that has passed, at most 1."""
        return min(self.elapsed() / self.limit, 1.0)

    def on_step_end(self, args, state, control, **keywords):
        over = self.limit is not None and self.elapsed() >= self.limit
        if self.limit is not None and args.world_size > 1:  # all processes stop at the same step
            over = global_count(int(over), args.device) > 0
        if over:
            control.should_training_stop = control.should_evaluate = control.should_save = True
        return control


class StepClock:
    """Time spent in steps, without that of validation, samples and checkpoints."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Start to measure anew."""
        self.began, self.aside = time.perf_counter(), 0.0

    def elapsed(self) -> float:
        """Return the seconds since the last reset."""
        return time.perf_counter() - self.began - self.aside

    def __enter__(self) -> "StepClock":
        """Stop the clock inside the block."""
        self._paused = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        self.aside += time.perf_counter() - self._paused


def clock_text(seconds: float) -> str:
    """Return a time as text: 3725 -> 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
