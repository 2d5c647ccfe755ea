"""Stage 2, `blipren train`: the connector learns to caption and to answer through the language model.

`LikelihoodTrainer.compute_loss` is the step, `build_trainer` puts model, batches and trainer together. What every stage
shares is in `engine/trainer/`: `run.py` is the course of a run, `stage_trainer.py` checkpoints, log and validation.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import EarlyStoppingCallback

from blipren.training.commands.train import TrainSettings
from blipren.training.console import print_line
from blipren.training.data.batches.blocks import PromptEncoder
from blipren.training.data.batches.datasets import EvalBatches, TrainBatches
from blipren.training.data.batches.masks import build_attention_mask, dense_attention
from blipren.training.data.batches.plan import BatchPlan
from blipren.training.data.batches.training_data import open_caches, open_online, read_caches
from blipren.training.engine import deepspeed as zero
from blipren.training.engine import flops
from blipren.training.engine.device import choose_device, choose_precision
from blipren.training.engine.fsdp import full_tensor, shard
from blipren.training.engine.model_setup import (
    check_fused_loss,
    choose_layout,
    load_to_train,
    set_attention,
    set_precision,
)
from blipren.training.engine.optimizer import Average, parameter_groups
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trained_parts import checkpoint_activations, choose_trained, merge_lora
from blipren.training.engine.trainer.arguments import training_arguments
from blipren.training.engine.trainer.log_window import LogWindow, token_log_line
from blipren.training.engine.trainer.run import process_count, run_stage
from blipren.training.engine.trainer.stage_trainer import StageTrainer
from blipren.training.errors import UserError
from blipren.training.objectives.experiments.build import build_experiments
from blipren.training.objectives.experiments.experiment import Experiment
from blipren.training.objectives.likelihood import answer_losses
from blipren.training.stages.validation import AnswerValidation


class LikelihoodTrainer(StageTrainer):
    """Trains on `TrainBatches`, validates on all of `EvalBatches`. The loss is summed over answer tokens and divided by
    their global number, whatever the batching, accumulation or world size."""

    def __init__(
        self,
        *,
        settings: TrainSettings,
        processor,
        validation: EvalBatches | None,
        experiments: list[Experiment],
        half_precision: bool,
        **keywords,
    ):
        super().__init__(eval_dataset=validation, **keywords)
        self.settings, self.processor, self.experiments = settings, processor, experiments
        self.validation = AnswerValidation(self, processor, validation, settings) if validation is not None else None
        self.half_precision = half_precision
        self.seconds: float | None = None  # in steps, of the whole run
        self.window = LogWindow()
        self.flops_per_token: float | None = None

    # ---- the step -------------------------------------------------------------------------------------------------

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        """One micro-batch: features and tokens in, this process's part of the step's loss out."""
        s, (tokens_in_step, images_in_step) = self.settings, num_items_in_batch
        loss = nll = torch.zeros((), device=batch["targets"].device)
        router_probs = None
        if s.likelihood_weight or not model.training:
            inputs, attention_mask = self.regularized(batch) if model.training else self.plain(batch)
            outputs = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=attention_mask,
                logits_at=batch["predict_from"],
                targets=batch["targets"] if s.fused_loss else None,
                use_cache=False,
                **inputs,
            )
            if s.fused_loss:
                nll = objective = outputs.loss
            else:
                nll, objective = answer_losses(outputs.logits, batch["targets"], s.label_smoothing)
            loss, router_probs = s.likelihood_weight * objective / tokens_in_step, outputs.router_probs
            if outputs.router_aux_loss is not None:
                loss = loss + outputs.router_aux_loss * len(batch["ids"]) / images_in_step
        for experiment in self.experiments:
            if experiment.weight:
                loss = loss + experiment.weight * experiment.loss(self, model, batch) / images_in_step

        if not self.window.nll:
            self.window.first_step = self.state.global_step
        self.window.add(batch, nll.detach(), loss.detach(), router_probs)
        return loss * self.accelerator.num_processes  # DDP averages gradients over processes; the loss is a sum

    def plain(self, batch: dict) -> tuple[dict, torch.Tensor | BlockMask]:
        """Return inputs and mask of a batch, with nothing dropped."""
        return batch["inputs"], build_attention_mask(batch, self.model.parts()["llm"])

    def regularized(self, batch: dict) -> tuple[dict, torch.Tensor | BlockMask]:
        """Return inputs and mask of a training batch, with dropped patches, noise and dropped words."""
        s, inputs = self.settings, dict(batch["inputs"])
        features = inputs.get("patch_features")
        if features is not None and s.feature_noise:
            features = features.float()
            features = features + torch.randn_like(features) * s.feature_noise * features.std()
        if features is not None and s.feature_dropout:
            mask = inputs.get("patch_attention_mask")
            kept = torch.rand(features.shape[:2], device=features.device) >= s.feature_dropout
            kept[:, 0] = True  # an image keeps at least one
            if self.model.config.connector == "qformer":  # no query attends to what is dropped
                inputs["patch_attention_mask"] = kept.long() if mask is None else mask * kept
            else:  # every patch is a visual token: a dropped one becomes the mean
                features = torch.where(kept[..., None], features, features.mean(dim=1, keepdim=True))
        if features is not None:
            inputs["patch_features"] = features
        unseen = None
        if s.word_dropout:
            answer = batch["is_answer"]
            unseen = answer & (torch.rand(answer.shape, device=answer.device) < s.word_dropout)
        return inputs, build_attention_mask(batch, self.model.parts()["llm"], unseen)

    def count_step(self, batches: list[dict]) -> torch.Tensor:
        """Return [answer tokens, images] of this process's part of a step."""
        return torch.tensor(
            [float(sum(len(b["targets"]) for b in batches)), float(sum(len(b["ids"]) for b in batches))]
        )

    # ---- log and validation ---------------------------------------------------------------------------------------

    def log_values(self, logs: dict[str, float]) -> dict[str, float]:
        counts = self.window.drain(self.accelerator)
        seconds, step = self.clock.elapsed(), self.state.global_step
        if self.seconds is None:  # those of the run that this one resumes
            self.seconds = max((event.get("seconds", 0.0) for event in self.run_folder.events()), default=0.0)
        self.seconds += seconds
        self.seconds_per_step = seconds / (step - self.window.first_step)
        self.clock.reset()
        values = {"epoch": round(step / self.train_dataset.plan.steps_per_epoch, 4)}
        if self.settings.likelihood_weight:
            values["loss"] = counts["nll"] / counts["targets"]
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
        for experiment in self.experiments:
            values |= experiment.log_values()
        if self.flops_per_token:
            rate = values["tokens_per_second"] * self.flops_per_token
            values["tflops"] = rate / 1e12
            peak = flops.peak(self.args.device, half=self.half_precision)
            if peak is not None:
                values["mfu"] = rate / (peak * self.accelerator.num_processes)
        return values

    def log_line(self, values: dict[str, float]) -> str:
        shown = ["loss"] if self.settings.likelihood_weight else ["objective"]
        shown += [name for name in ("words_loss", "reward") if name in values]
        step, steps = self.state.global_step, self.state.max_steps
        return token_log_line(step, steps, values, shown, (steps - step) * self.seconds_per_step)

    def validate(self) -> dict[str, float]:
        """Return the loss, CIDEr where it chooses the model; the sample captions are logged."""
        metrics: dict[str, float] = {"images": self.validation.images, "loss": self.validation.loss()}
        if self.settings.keep_best == "CIDEr":
            metrics["CIDEr"] = self.validation.cider()
        self.validation.log_samples("during")
        return metrics

    # ---- begin and end --------------------------------------------------------------------------------------------

    def begin(self, resumed: bool) -> None:
        try_step(self, self.model)
        if not resumed and self.validation is not None:
            self.validation.log_samples("before")

    def write_model(self, folder: Path) -> None:
        trained = self.trained_weights()
        if self.validation is not None:
            self.validation.log_samples("after")
        if not self.args.should_save:
            return
        # into a fresh copy, whose frozen parts are bit for bit what they were, in the precision that they had
        settings = self.settings
        model, _ = load_to_train(settings.model, settings)
        choose_trained(model, settings, settings.train_vision)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])
        if settings.merge_lora:
            merge_lora(model)
        model.save_pretrained(folder) if writes_full_checkpoint(settings) else model.save_bridge(folder)
        self.processor.save_pretrained(folder)

    def summary(self, best_step: int | None) -> dict:
        found = {"steps": self.state.global_step, "kept": "last" if best_step is None else f"step {best_step}"}
        if self.state.best_metric is not None:
            found[self.settings.keep_best] = self.state.best_metric
        return found

    def summary_lines(self, summary: dict) -> list[str]:
        which, kind = "last weights", "Full" if writes_full_checkpoint(self.settings) else "Bridge"
        if summary["kept"] != "last":
            name = self.settings.keep_best
            which = f"best of validation, {name} {summary[name]:.4f} at {summary['kept']}"
        return [
            f"done: {summary['steps']} steps; {which}. {kind} checkpoint, log.jsonl and curves.png in "
            f"{self.run_folder.path}"
        ]


def writes_full_checkpoint(settings: TrainSettings) -> bool:
    """Return whether the finished model holds all parts: a bridge cannot hold a trained LLM or vision encoder."""
    return settings.full or settings.llm_tuning == "full" or settings.train_vision


def try_step(trainer: LikelihoodTrainer, model) -> None:
    """Run the first micro-batch forward and backward, without an update, to count FLOPs per useful token.

    It runs in SDPA where the run takes FlexAttention, whose arithmetic torch cannot count.

    Raises:
        UserError: no gradient reaches the connector, so that it would learn nothing from any image.
    """
    if not trainer.settings.likelihood_weight:
        return  # no token passes through the language model
    batch = trainer._prepare_inputs(trainer.train_dataset[0])
    model.train()
    counts = torch.tensor([float(len(batch["targets"])), float(len(batch["ids"]))], device=trainer.args.device)
    experiments, trainer.experiments = trainer.experiments, []  # not part of what a useful token costs

    def step() -> None:
        loss = trainer.compute_loss(model, batch, num_items_in_batch=counts)
        if loss.requires_grad:
            loss.backward()

    with dense_attention(model.parts()["llm"]):
        total = flops.count(step)
    trainer.experiments = experiments
    projector = model.parts()["projector"].named_parameters()  # a router has a loss of its own
    trained = [p for name, p in projector if p.requires_grad and not name.startswith("router")]
    if trained and not any(full_tensor(p.grad).any() for p in trained if p.grad is not None):
        raise UserError(
            "no gradient reaches the projector: the language model lets none through, so that training would ignore "
            "every image. Leave out what is special about it (such as --llm-bits), or take another, with another OUT"
        )
    model.zero_grad()
    tokens = trainer.window.counts["tokens"]
    trainer.window = LogWindow()
    trainer.flops_per_token = total / int(tokens)


def make_plan(settings: TrainSettings, sources: Sequence, processes: int) -> BatchPlan:
    """Return the batch plan; a step is cut into a multiple of the number of processes.

    Raises:
        UserError: a step cannot be cut so.
    """
    try:
        return BatchPlan(
            sizes=tuple(len(source.texts) for source in sources),
            weights=tuple(source.weight for source in sources),
            seed=settings.seed,
            images_per_step=settings.batch_size,
            micro_batches=-(-settings.micro_batches // processes) * processes,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def build_trainer(settings: TrainSettings, run: RunFolder) -> LikelihoodTrainer:
    """Return the trainer of a run: model, sources, experiments, batches."""
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    zero_config = zero.read_config(settings.deepspeed, device)
    if zero_config and precision == "fp16":
        raise UserError("deepspeed trains in bf16 or fp32 here, not fp16; give --precision bf16")
    experiments, processes = build_experiments(settings.experiment_settings()), process_count()
    if processes > 1 and not settings.likelihood_weight and not any(e.calls_model for e in experiments):
        # DDP's forward is never called, so that gradients are not averaged
        raise UserError(f"likelihood_weight 0 with bag_of_words alone trains on one process; there are {processes}")

    torch.manual_seed(settings.seed)
    caches = [] if settings.online else read_caches(settings.cache)
    model, processor = load_to_train(settings.model, settings, precision)
    if settings.online:
        sources, validation = open_online(settings.cache, model, processor, settings, settings.augment)
    else:
        sources, validation = open_caches(caches, model, processor)
    for experiment in experiments:
        experiment.prepare(model, processor, sources)
    choose_trained(model, settings, settings.train_vision)
    if settings.attention:
        set_attention(model, settings.attention, device)
    if settings.fused_loss:
        check_fused_loss(model)
    set_precision(model, precision)

    plan, prompts = make_plan(settings, sources, processes), PromptEncoder(processor)
    layout = choose_layout(model, processor, settings, sources)
    steps = settings.max_steps or math.ceil(settings.epochs * plan.steps_per_epoch)
    run.claim(settings)
    if run.writes:
        print_line(model.describe_trainable())
        print_line(
            f"{steps} steps of {plan.images_per_epoch / plan.steps_per_epoch:.0f} images in {plan.micro_batches} "
            f"micro-batches, {plan.steps_per_epoch} an epoch of {plan.images_per_epoch:,} images; {precision} on "
            f"{device}, {processes} process{'es' if processes > 1 else ''}; validation on "
            f"{len(validation.texts) if validation else 0} images; run folder {run.path}"
        )

    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    if settings.compile:
        os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "true"  # lengths differ from batch to batch
    judge = settings.keep_best if validation is not None and settings.keep_best != "last" else None
    args = training_arguments(
        settings,
        run,
        max_steps=steps,
        accumulation=plan.micro_batches // processes,
        eval_steps=(settings.eval_every or min(plan.steps_per_epoch, steps)) if validation is not None else None,
        use_cpu=device == "cpu" and not zero_config,  # DeepSpeed chooses the device, which is the same
        bf16=precision == "bf16" and not zero_config,
        fp16=precision == "fp16",
        deepspeed=zero_config,
        **(zero.start(device) if zero_config else {}),
        metric_for_best_model=judge,
        greater_is_better=judge == "CIDEr",
        torch_compile=settings.compile,
        torch_compile_backend=settings.compile_backend if settings.compile else None,
    )
    if zero_config and precision == "bf16":  # inside of DeepSpeed's engine, where it would cast the weights themselves
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    if settings.fsdp and processes > 1:
        shard(model)
    return LikelihoodTrainer(
        settings=settings,
        processor=processor,
        validation=EvalBatches(validation, prompts, layout, settings.batch_size) if validation is not None else None,
        experiments=experiments,
        half_precision=precision != "fp32",
        run=run,
        average=Average(model, settings.ema) if settings.ema else None,
        groups=parameter_groups(model, settings),
        betas=settings.adam_betas,
        model=model,
        args=args,
        train_dataset=TrainBatches(sources, prompts, plan, layout, steps),
        callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience and judge else None,
    )


def train(settings: TrainSettings) -> int:
    """Run `blipren train`. Returns the exit status."""
    return run_stage(settings, build_trainer)
