"""FSDP2: parameters, gradients and optimizer state sharded over processes; checkpoints whole, as without it."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from blipren.training.errors import UserError


def shard(model: nn.Module) -> None:
    """Shard every transformer layer, then vision tower and connector, then the rest with the root."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module)
    for part in ("vision", "qformer", "projector"):
        if part in model.parts():
            fully_shard(model.parts()[part])
    fully_shard(model)
    # tell the Trainer that the model itself places its weights and reduces its gradients
    if not hasattr(model, "is_distributed_loading_by_transformers"):
        raise UserError("fsdp needs transformers 5.23 or newer, whose Trainer takes a model that shards itself")
    model._is_distributed_loading_by_transformers = True
    model._is_fsdp_managed_module = True


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` was called on a model."""
    return isinstance(model, FSDPModule)


def full_tensor(tensor):
    """Return all of a sharded tensor on this process; every process must call it. Anything else comes back as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return the share of a whole tensor that this process holds of `parameter`."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def optimizer_state(optimizer) -> dict:
    """Return the optimizer's state with whole tensors; every process must call it."""
    return tree_map(full_tensor, optimizer.state_dict())


def load_optimizer_state(optimizer, state: dict) -> None:
    """Load a state with whole tensors, of which each process keeps the share of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape:
                values[name] = shard_like(value, parameters[index])
    optimizer.load_state_dict(state)
