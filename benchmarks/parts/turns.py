"""Two trainers that take turns, a step each, so that other work on the machine slows both."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Condition

from transformers import Trainer, TrainerCallback


class StepClock(TrainerCallback):
    """Processor and wall seconds of the steps of one of two trainers, with the reading of their batches."""

    def __init__(self, others: list, changed: Condition):
        self.others, self.changed = others, changed
        self.steps: list[tuple[float, float]] = []
        self.own_turn = False

    def give_turn(self) -> None:
        with self.changed:
            self.own_turn = False
            for other in self.others:
                other.own_turn = True
            self.changed.notify_all()

    def take_turn(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.own_turn or not self.others)
        self.began = (time.process_time(), time.perf_counter())

    def on_train_begin(self, *arguments, **keywords):
        self.take_turn()

    def on_step_end(self, *arguments, **keywords):
        self.steps.append((time.process_time() - self.began[0], time.perf_counter() - self.began[1]))
        self.give_turn()
        self.take_turn()

    def leave(self) -> None:
        """Let the other trainer go on alone."""
        with self.changed:
            for other in self.others:
                other.others = []
            self.changed.notify_all()

    def seconds(self) -> dict[str, float]:
        """Return the medians of all steps but the first."""
        cpu, wall = zip(*self.steps[1:])
        return {"cpu_seconds": statistics.median(cpu), "wall_seconds": statistics.median(wall)}


def train_in_turns(theirs: Trainer, ours: Trainer) -> tuple[StepClock, StepClock]:
    """Train both and return their clocks. Ours trains in the main thread, where alone it can handle signals."""
    changed = Condition()
    clocks = StepClock([], changed), StepClock([], changed)
    clocks[0].others, clocks[1].others = [clocks[1]], [clocks[0]]
    clocks[0].own_turn = True

    def train(trainer: Trainer, clock: StepClock) -> None:
        trainer.add_callback(clock)
        try:
            trainer.train()
        finally:
            clock.leave()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(train, theirs, clocks[0])
        train(ours, clocks[1])
        other.result()
    return clocks
