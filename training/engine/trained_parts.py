"""What of a model is trained: parts, LoRA, groups of the optimizer, an average of the weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from blipren.training.engine.fsdp import full_tensor
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
    """Add each LoRA to the weight that it adapts, and remove it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False


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


def part_of(model: nn.Module) -> dict[str, str]:
    """Return the part of every parameter by name; a tied head belongs to the part that comes first."""
    modules = {id(module): part for part, module in model.parts().items()}
    owner = {}
    for name, module in model.named_modules():
        if id(module) in modules:
            part = "llm" if modules[id(module)] == "head" else modules[id(module)]
            for inner, _ in module.named_parameters(prefix=name):
                owner.setdefault(inner, part)
    return owner


def without_decay(model: nn.Module) -> set[str]:
    """Return the names of the parameters without weight decay: norms, biases, embeddings, queries."""
    names = set()
    for name, module in model.named_modules():
        for inner, parameter in module.named_parameters(prefix=name, recurse=False):
            norm = "norm" in type(module).__name__.lower()
            if parameter.ndim < 2 or norm or isinstance(module, nn.Embedding) or "query_tokens" in inner:
                names.add(inner)
    return names


def parameter_groups(model: nn.Module, settings) -> list[dict]:
    """Return the optimizer's groups, one for each (part, decayed or not), with learning rate, part and names.

    Args:
        settings: with `learning_rate`, `learning_rates` by part, and `weight_decay`.
    """
    owner, bare = part_of(model), without_decay(model)
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # a head that an experiment added belongs to no part of the model
        part, decayed = owner.get(name, "projector"), name not in bare
        group = groups.setdefault(
            (part, decayed),
            {
                "params": [],
                "names": [],
                "part": part,
                "lr": float(settings.learning_rates.get(part, settings.learning_rate)),
                "weight_decay": settings.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class Average:
    """Exponential moving average of the trained weights, in float32. The decay of step n is at most (1 + n) / (10 + n), so
    that a young average follows faster."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.trained.items():
            self.weights[name].lerp_(parameter.float(), 1 - decay)
        self.updates += 1

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights by name, unsharded and on the CPU; every process must call it."""
        return {name: full_tensor(tensor).cpu() for name, tensor in self.weights.items()}

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights inside the block, and its own again after it."""
        own = {name: p.detach().clone() for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            parameter.copy_(self.weights[name])
        try:
            yield
        finally:
            for name, parameter in self.trained.items():
                parameter.copy_(own[name])


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
