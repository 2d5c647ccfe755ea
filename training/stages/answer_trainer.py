"""The trainer of every stage that learns through the language model: log, finished model, summary.

`train`, `dpo` and `grpo` write `compute_loss`, `validate`, and what their log lines show.
"""

import abc
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import BlockMask

from blipren.training.checkpoint_config import missing_bases
from blipren.training.data.batches.datasets import EvalBatches
from blipren.training.data.batches.masks import build_attention_mask, dense_attention
from blipren.training.engine import flops
from blipren.training.engine.fsdp import full_tensor
from blipren.training.engine.model_setup import load_to_train
from blipren.training.engine.trained_parts import choose_trained, merge_lora
from blipren.training.engine.trainer.log_window import LogWindow
from blipren.training.engine.trainer.stage_trainer import StageTrainer
from blipren.training.errors import UserError
from blipren.training.stages.validation import AnswerValidation


class AnswerTrainer(StageTrainer):
    """Trainer over micro-batches of answers behind prefixes, as `TrainBatches` gives them.

    Args:
        settings: of the command, with the groups of `engine/settings.py`.
        validation: of the validation split; None without one.
        train_vision: whether the vision encoder is trained.
        half_precision: whether the arithmetic is in 16 bits, for the share of the peak FLOPs in the log.
    """

    compared: tuple[str, ...] = ()
    """Names of validation metrics whose values before and after the run its summary has."""

    def __init__(
        self,
        *,
        settings,
        processor,
        validation: EvalBatches | None,
        half_precision: bool,
        train_vision: bool = False,
        **keywords,
    ):
        super().__init__(eval_dataset=validation, **keywords)
        self.settings, self.processor, self.train_vision = settings, processor, train_vision
        self.validation = AnswerValidation(self, processor, validation, settings) if validation is not None else None
        self.half_precision = half_precision
        self.seconds: float | None = None  # in steps, of the whole run
        self.window = LogWindow()
        self.flops_per_token: float | None = None

    @abc.abstractmethod
    def objective_values(self, counts: dict) -> dict[str, float]:
        """Return what a log line shows of the objective, from the sums of `LogWindow.drain`."""

    def plain(self, batch: dict) -> tuple[dict, torch.Tensor | BlockMask]:
        """Return inputs and mask of a batch, with nothing dropped."""
        return batch["inputs"], build_attention_mask(batch, self.model.parts()["llm"])

    def zero_of_connector(self) -> torch.Tensor:
        """Return 0 as a function of the connector: the same weights take part in the backward pass of every batch."""
        config, device = self.model.config, self.args.device
        features = self.model.get_image_features(
            patch_features=torch.zeros(1, 1, config.patch_feature_size, device=device), return_dict=True
        )
        return 0.0 * torch.cat(list(features.pooler_output)).float().sum()

    def log_values(self, logs: dict[str, float]) -> dict[str, float]:
        counts = self.window.drain(self.accelerator)
        seconds, step = self.clock.elapsed(), self.state.global_step
        if self.seconds is None:  # those of the run that this one resumes
            self.seconds = max((event.get("seconds", 0.0) for event in self.run_folder.events()), default=0.0)
        self.seconds += seconds
        self.seconds_per_step = seconds / (step - self.window.first_step)
        self.clock.reset()
        values = {"epoch": round(step / self.train_dataset.plan.steps_per_epoch, 4)}
        values |= self.objective_values(counts)
        values |= {
            "objective": counts["loss"] / (step - self.window.first_step),
            "grad_norm": float(logs.get("grad_norm") or 0.0),
            "learning_rate": logs["learning_rate"],
            "tokens_per_second": counts["tokens"] / seconds,
            "images_per_second": counts["images"] / seconds,
            "useful_tokens": counts["tokens"] / counts["positions"],
            "seconds": round(self.seconds, 2),
            **{f"expert_{i}": share for i, share in enumerate(counts["experts"])},
        }
        if self.flops_per_token:
            rate = values["tokens_per_second"] * self.flops_per_token
            values["tflops"] = rate / 1e12
            peak = flops.peak(self.args.device, half=self.half_precision)
            if peak is not None:
                values["mfu"] = rate / (peak * self.accelerator.num_processes)
        return values

    def write_model(self, folder: Path) -> None:
        trained = self.trained_weights()
        if self.validation is not None:
            self.validation.log_samples("after")
        if not self.args.should_save:
            return
        # into a fresh copy, whose frozen parts are bit for bit what they were, in the precision that they had
        settings = self.settings
        model, _ = load_to_train(settings.model, settings)
        choose_trained(model, settings, self.train_vision)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])
        if settings.merge_lora:
            merge_lora(model)
        model.save_pretrained(folder) if self.writes_full_checkpoint() else model.save_bridge(folder)
        self.processor.save_pretrained(folder)

    def log_text_loss(self) -> None:
        """Log what the language model loses on text without images before it is trained, where it is trained at all."""
        if self.validation is not None and self.settings.llm_tuning != "frozen":
            self.run_folder.log("text", 0, loss=self.validation.text_loss(self.text_sources()))

    def text_sources(self) -> Sequence:
        """Return the sources of the validation split whose answers show what tuning costs the language model."""
        return self.validation.batches.data

    def summary(self, best_step: int | None) -> dict:
        found = {"steps": self.state.global_step, "kept": "last" if best_step is None else f"step {best_step}"}
        before = next((event["loss"] for event in self.run_folder.events() if event["kind"] == "text"), None)
        if before is not None:
            found["text_loss"] = {"before": before, "after": self.validation.text_loss(self.text_sources())}
        if self.state.best_metric is not None:
            found[self.settings.keep_best] = self.state.best_metric
        validations = [event for event in self.run_folder.events() if event["kind"] == "validation"]
        kept = self.state.global_step if best_step is None else best_step
        for name in self.compared:
            values = {event["step"]: event[name] for event in validations if name in event}
            if 0 in values and kept in values:
                found.setdefault("validation", {})[name] = {"before": values[0], "after": values[kept]}
        return found

    def summary_lines(self, summary: dict) -> list[str]:
        which, kind = "last weights", "Full" if self.writes_full_checkpoint() else "Bridge"
        missing = missing_bases(self.model.config)
        if summary["kept"] != "last":
            name = self.settings.keep_best
            which = f"best of validation, {name} {summary[name]:.4f} at {summary['kept']}"
        lines = []
        if text := summary.get("text_loss"):
            lines.append(
                f"the language model's loss on text without images: {text['before']:.4f} before, {text['after']:.4f} "
                "after, in nats a token; training on texts alone beside the images keeps it low"
            )
        return [
            *lines,
            *([f"a full checkpoint is written, since {' and '.join(missing)} is not here"] if missing else []),
            f"done: {summary['steps']} steps; {which}. {kind} checkpoint, log.jsonl and curves.png in "
            f"{self.run_folder.path}",
        ]

    def writes_full_checkpoint(self) -> bool:
        """Return whether the finished model holds all parts: a bridge cannot hold a trained LLM or vision encoder, and does
        not load without its base models."""
        trained = self.settings.llm_tuning == "full" or self.train_vision
        return self.settings.full or trained or bool(missing_bases(self.model.config))

    def try_step(self) -> None:
        """Run the first micro-batch forward and backward, without an update, to count FLOPs per useful token.

        It runs in SDPA where the run takes FlexAttention, whose arithmetic torch cannot count.

        Raises:
            UserError: no gradient reaches the connector, so that it would learn nothing from any image.
        """
        model = self.model
        items = (self.train_dataset[number] for number in range(len(self.train_dataset)))
        batch = next((batch for batch in items if batch["inputs"]), None)
        if batch is None:
            if self.settings.llm_tuning == "frozen":
                raise UserError("no conversation has an image, and the language model is frozen: nothing would learn")
            return
        batch = self._prepare_inputs(batch)
        model.train()
        counts = self.count_step([batch]).to(self.args.device)

        def step() -> None:
            loss = self.compute_loss(model, batch, num_items_in_batch=counts)
            if loss.requires_grad:
                loss.backward()

        with dense_attention(model.parts()["llm"]):
            total = flops.count(step)
        projector = model.parts()["projector"].named_parameters()  # a router has a loss of its own
        trained = [p for name, p in projector if p.requires_grad and not name.startswith("router")]
        if trained and not any(full_tensor(p.grad).any() for p in trained if p.grad is not None):
            raise UserError(
                "no gradient reaches the projector: the language model lets none through, so that training would "
                "ignore every image. Leave out what is special about it (such as --llm-bits), or take another, with "
                "another OUT"
            )
        model.zero_grad()
        tokens = self.window.counts["tokens"]
        self.window = LogWindow()
        self.flops_per_token = total / int(tokens)
