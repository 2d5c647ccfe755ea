"""What `dpo` and `grpo` do before their trainer is made: model, sources, plan, layout, TRL's and the Trainer's settings."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import EarlyStoppingCallback

from blipren.training.data.batches.blocks import PromptEncoder
from blipren.training.data.batches.datasets import Layout
from blipren.training.data.batches.plan import BatchPlan
from blipren.training.engine.device import choose_device, choose_precision
from blipren.training.engine.model_setup import choose_layout, load_to_train, set_attention, set_precision
from blipren.training.engine.optimizer import Average, parameter_groups
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trained_parts import checkpoint_activations, choose_trained
from blipren.training.engine.trainer.arguments import training_arguments
from blipren.training.engine.trainer.run import process_count
from blipren.training.stages.train import make_plan, print_plan


@dataclass
class PreferenceRun:
    """A run that is ready but for its trainer.

    Attributes:
        sources, validation: training splits; those of validation, none if there is nothing to validate on.
        keywords: of the trainer, as `AnswerTrainer` and the Trainer take them.
    """

    model: Any
    processor: Any
    sources: list
    validation: list
    prompts: PromptEncoder
    plan: BatchPlan
    layout: Layout
    steps: int
    device: torch.device
    keywords: dict[str, Any]


def prepare_run(
    settings,
    run: RunFolder,
    open_sources: Callable[[Any, Any], tuple[list, list]],
    best_is_greater: bool,
    completion_tokens: int = 0,
) -> PreferenceRun:
    """Load the model, open the sources, and claim the run's folder.

    Args:
        settings: of `dpo` or `grpo`.
        open_sources: from model and processor to the training and the validation splits.
        best_is_greater: whether the best model is that of the greatest `keep_best`.
        completion_tokens: most tokens of an answer that the model gives itself.

    Raises:
        UserError: something does not fit; the folder is untouched.
    """
    from trl.trainer.utils import disable_dropout_in_model

    device = choose_device(settings.device)
    precision, processes = choose_precision(settings.precision, device), process_count()
    torch.manual_seed(settings.seed)
    model, processor = load_to_train(settings.model, settings, precision)
    sources, validation = open_sources(model, processor)
    choose_trained(model, settings)
    if settings.attention:
        set_attention(model, settings.attention, device)
    set_precision(model, precision)
    if settings.disable_dropout:
        disable_dropout_in_model(model)
    plan, prompts = make_plan(settings, sources, processes), PromptEncoder(processor)
    layout = choose_layout(model, processor, settings, sources, longest_completion=completion_tokens)
    steps = settings.max_steps or math.ceil(settings.epochs * plan.steps_per_epoch)
    run.claim(settings)
    print_plan(model, run, plan, steps, precision, device, validation)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    judge = settings.keep_best if validation and settings.keep_best != "last" else None
    args = training_arguments(
        settings,
        run,
        max_steps=steps,
        accumulation=plan.micro_batches // processes,
        eval_steps=(settings.eval_every or min(plan.steps_per_epoch, steps)) if validation else None,
        use_cpu=device == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        metric_for_best_model=judge,
        greater_is_better=best_is_greater,
    )
    keywords = dict(
        settings=settings,
        processor=processor,
        half_precision=precision != "fp32",
        run=run,
        average=Average(model, settings.ema) if settings.ema else None,
        groups=parameter_groups(model, settings),
        betas=settings.adam_betas,
        model=model,
        args=args,
        callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience and judge else None,
    )
    return PreferenceRun(model, processor, sources, validation, prompts, plan, layout, steps, args.device, keywords)
