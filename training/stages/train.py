"""Stage 2, `blipren train`: the connector learns to caption and to answer through the language model.

`LikelihoodTrainer.compute_loss` is the step, `build_trainer` puts model, batches and trainer together. What the stages
through the language model share is in `answer_trainer.py`, what every stage shares in `engine/trainer/`: `run.py` is the
course of a run, `stage_trainer.py` checkpoints, log and validation.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import EarlyStoppingCallback

from blipren.training.commands.train import TrainSettings
from blipren.training.console import print_line
from blipren.training.data.batches.blocks import PromptEncoder
from blipren.training.data.batches.datasets import EvalBatches, TrainBatches
from blipren.training.data.batches.masks import build_attention_mask
from blipren.training.data.batches.plan import BatchPlan
from blipren.training.data.batches.samples import CachedSamples
from blipren.training.data.batches.training_data import open_caches, open_online, read_caches
from blipren.training.engine import deepspeed as zero
from blipren.training.engine.device import choose_device, choose_precision
from blipren.training.engine.fsdp import shard
from blipren.training.engine.model_setup import (
    check_fused_loss,
    choose_layout,
    load_to_train,
    set_attention,
    set_precision,
)
from blipren.training.engine.optimizer import Average, mark_matrices, parameter_groups
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trained_parts import checkpoint_activations, choose_trained, compile_layers
from blipren.training.engine.trainer.arguments import training_arguments
from blipren.training.engine.trainer.log_window import token_log_line
from blipren.training.engine.trainer.run import process_count, run_stage
from blipren.training.errors import UserError
from blipren.training.objectives.experiments.build import build_experiments
from blipren.training.objectives.experiments.experiment import Experiment
from blipren.training.objectives.likelihood import answer_losses
from blipren.training.stages.answer_trainer import AnswerTrainer


class LikelihoodTrainer(AnswerTrainer):
    """Trains on `TrainBatches`, validates on all of `EvalBatches`. The loss is summed over answer tokens and divided by
    their global number, whatever the batching, accumulation or world size."""

    def __init__(self, *, experiments: list[Experiment], **keywords):
        super().__init__(**keywords)
        self.experiments = experiments

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
            if not batch["inputs"] and model.training:  # texts alone
                loss = loss + self.zero_of_connector()
        for experiment in self.experiments:
            if experiment.weight:
                loss = loss + experiment.weight * experiment.loss(self, model, batch) / images_in_step

        if not self.window.nll:
            self.window.first_step = self.state.global_step
        self.window.add(batch, nll.detach(), loss.detach(), router_probs)
        return loss * self.accelerator.num_processes  # DDP averages gradients over processes; the loss is a sum

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

    def objective_values(self, counts: dict) -> dict[str, float]:
        return {"loss": counts["nll"] / counts["targets"]} if self.settings.likelihood_weight else {}

    def log_values(self, logs: dict[str, float]) -> dict[str, float]:
        values = super().log_values(logs)
        for experiment in self.experiments:
            values |= experiment.log_values()
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
        if self.settings.likelihood_weight:  # else no token passes through the language model
            experiments, self.experiments = self.experiments, []  # not part of what a useful token costs
            self.try_step()
            self.experiments = experiments
        if not resumed and self.validation is not None:
            self.validation.log_samples("before")
            self.log_text_loss()


def make_plan(settings: TrainSettings, sources: Sequence, processes: int) -> BatchPlan:
    """Return the batch plan; a step is cut into a multiple of the number of processes.

    Raises:
        UserError: a step cannot be cut so.
    """
    try:
        return BatchPlan(
            sizes=tuple(len(source) for source in sources),
            weights=tuple(source.weight for source in sources),
            seed=settings.seed,
            images_per_step=settings.batch_size,
            micro_batches=-(-settings.micro_batches // processes) * processes,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def print_plan(
    model, run: RunFolder, plan: BatchPlan, steps: int, precision: str, device: str, validation: list
) -> None:
    """Print what is trained, on what, and where, from the process that writes."""
    if run.writes:
        processes = process_count()
        print_line(model.describe_trainable())
        print_line(
            f"{steps} steps of {plan.images_per_epoch / plan.steps_per_epoch:.0f} images in {plan.micro_batches} "
            f"micro-batches, {plan.steps_per_epoch} an epoch of {plan.images_per_epoch:,} images; {precision} on "
            f"{device}, {processes} process{'es' if processes > 1 else ''}; validation on "
            f"{sum(map(len, validation))} images; run folder {run.path}"
        )


def build_trainer(settings: TrainSettings, run: RunFolder) -> LikelihoodTrainer:
    """Return the trainer of a run: model, sources, experiments, batches."""
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    zero_config = zero.read_config(settings.deepspeed, device)
    if zero_config and precision == "fp16":
        raise UserError("deepspeed trains in bf16 or fp32 here, not fp16; give --precision bf16")
    experiments, processes = build_experiments(settings.experiment_settings()), process_count()
    if processes > 1 and not settings.likelihood_weight:
        # DDP's forward is never called, so that gradients are not averaged
        raise UserError(f"likelihood_weight 0 with bag_of_words alone trains on one process; there are {processes}")

    torch.manual_seed(settings.seed)
    caches = [] if settings.online else read_caches(settings.cache)
    model, processor = load_to_train(settings.model, settings, precision)
    if settings.online:
        sources, validation = open_online(settings.cache, model, processor, settings, settings.augment)
    else:
        sources, validation = open_caches(caches, model, processor, settings.traces)
    samples = [source for source in sources if isinstance(source, CachedSamples)]
    if experiments and samples:
        raise UserError(
            "experiments learn from captions alone: train on a cache without conversations, or without them"
        )
    if settings.fsdp and processes > 1 and (texts := sum(not images for own in samples for images in own.images)):
        raise UserError(
            f"{texts} conversations have no image: with fsdp, a process whose micro-batch has none would not run the "
            "connector that all gather their shares for. Leave them out of the cache, or leave fsdp out"
        )
    for experiment in experiments:
        experiment.prepare(model, processor, sources)
    choose_trained(model, settings, settings.train_vision)
    if settings.attention:
        set_attention(model, settings.attention, device)
    if settings.fused_loss:
        check_fused_loss(model)
    set_precision(model, precision)

    plan, prompts = make_plan(settings, sources, processes), PromptEncoder(processor)
    layout = choose_layout(model, processor, settings, sources, settings.answers_per_image, settings.max_answer_tokens)
    steps = settings.max_steps or math.ceil(settings.epochs * plan.steps_per_epoch)
    run.claim(settings)
    print_plan(model, run, plan, steps, precision, device, validation)

    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    if settings.compile:
        compile_layers(model, settings.compile_backend)
    judge = settings.keep_best if validation and settings.keep_best != "last" else None
    args = training_arguments(
        settings,
        run,
        max_steps=steps,
        accumulation=plan.micro_batches // processes,
        eval_steps=(settings.eval_every or min(plan.steps_per_epoch, steps)) if validation else None,
        use_cpu=device == "cpu" and not zero_config,  # DeepSpeed chooses the device, which is the same
        bf16=precision == "bf16" and not zero_config,
        fp16=precision == "fp16",
        deepspeed=zero_config,
        **(zero.start(device) if zero_config else {}),
        metric_for_best_model=judge,
        greater_is_better=judge == "CIDEr",
    )
    if zero_config and precision == "bf16":  # inside of DeepSpeed's engine, where it would cast the weights themselves
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    if settings.fsdp and processes > 1:
        shard(model)
    groups = parameter_groups(model, settings)
    if settings.optimizer == "muon":
        mark_matrices(groups, settings)
    return LikelihoodTrainer(
        settings=settings,
        processor=processor,
        validation=EvalBatches(validation, prompts, layout, settings.batch_size) if validation else None,
        experiments=experiments,
        half_precision=precision != "fp32",
        train_vision=settings.train_vision,
        run=run,
        average=Average(model, settings.ema) if settings.ema else None,
        groups=groups,
        betas=settings.adam_betas,
        model=model,
        args=args,
        train_dataset=TrainBatches(sources, prompts, plan, layout, steps),
        callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience and judge else None,
    )


def train(settings: TrainSettings) -> int:
    """Run `blipren train`. Returns the exit status."""
    return run_stage(settings, build_trainer)
