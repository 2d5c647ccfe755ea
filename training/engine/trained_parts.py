"""What of a model is trained: its parts, LoRA, and activations that are recomputed."""

import re

import torch
from torch import nn

from blipren.training.engine.settings import TrainedPartsSettings
from blipren.training.errors import UserError


def linear_names(module: nn.Module) -> list[str]:
    """Return the last names of all linear layers below `module`, such as q_proj; GPT-2's are `Conv1D`s."""
    from transformers.pytorch_utils import Conv1D

    return sorted({name.rsplit(".", 1)[-1] for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)})


def add_lora(model: nn.Module, settings: TrainedPartsSettings) -> None:
    """Add LoRA (arXiv 2106.09685) to the language model, unless the checkpoint brings its own.

    Raises:
        UserError: `lora_targets` names a layer that the language model does not have.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return
    from peft import LoraConfig

    language_model = model.parts()["llm"]
    known = linear_names(language_model)
    targets = settings.lora_targets or known
    if unknown := [name for name in targets if name not in known]:
        raise UserError(f"lora_targets has {unknown[0]!r}; the language model's linear layers are {', '.join(known)}")
    prefix = next(name for name, module in model.named_modules() if module is language_model)
    names = "|".join(map(re.escape, targets))
    model.add_adapter(
        LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=rf"{re.escape(prefix)}\.(?:.*\.)?(?:{names})",
            init_lora_weights=True,
        )
    )


def merge_lora(model: nn.Module) -> None:
    """Add each LoRA to the weight that it adapts, and remove it. The language model then counts as trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    if model.config.base_models:
        model.config.base_models["llm"]["trained"] = True


def choose_trained(model: nn.Module, settings: TrainedPartsSettings, train_vision: bool = False) -> None:
    """Freeze everything but what the settings name, by the model's `freeze`.

    Raises:
        UserError: nothing is left to train.
    """
    if settings.llm_tuning == "lora":
        add_lora(model, settings)
    train = []
    if settings.train_connector:
        train += ["projector"] + (["qformer"] if settings.train_qformer else [])
    train += {"frozen": [], "lora": ["lora"], "full": ["llm"]}[settings.llm_tuning]
    train += ["vision"] if train_vision else []
    model.freeze([part for part in train if part != "qformer" or part in model.parts()])
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("nothing is trained: train the connector, the Q-Former or the language model")


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute the activations of every transformer layer in the backward pass.

    transformers' own switch leaves out layers in eval mode, and a frozen language model is in eval mode.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    def recomputed(forward):
        def call(*args, **keywords):
            if torch.is_grad_enabled():
                return checkpoint(forward, *args, use_reentrant=False, **keywords)
            return forward(*args, **keywords)

        return call

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = recomputed(module.forward)


def compile_layers(model: nn.Module, backend: str) -> None:
    """Compile every transformer layer by itself, for rows of any length.

    Layers of one class share their compiled code, so a model of 30 layers compiles one: the whole model as one graph took
    more than five minutes on a GPU (docs/results/negative.md). What lies between the layers stays uncompiled.
    Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.

    Raises:
        UserError: the language model has no such layers, so that nothing of it would be compiled.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.parts()["llm"].modules()):
        raise UserError("compile needs a language model whose layers are transformers' own: leave --compile out")
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, backend=backend)
