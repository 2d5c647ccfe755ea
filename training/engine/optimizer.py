"""The optimizer and its parameter groups, and an average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from blipren.training.engine.fsdp import full_tensor


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


def mark_matrices(groups: list[dict], settings) -> None:
    """Mark the groups of `parameter_groups` that hold the matrices of Q-Former and projector: Muon updates them.

    Args:
        settings: with `muon_momentum` and `muon_learning_rate`.
    """
    for group in groups:
        if group["part"] in ("qformer", "projector") and all(p.ndim == 2 for p in group["params"]):
            group |= {"muon": True, "momentum": settings.muon_momentum}
            group["lr"] = settings.muon_learning_rate or group["lr"]


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # the coefficients of Muon's author
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` (torch 2.9 and newer) with the same numbers, which orthogonalizes the matrices of one shape together:
    a bridge has many small ones.

    Source: https://kellerjordan.github.io/posts/muon/, with Nesterov momentum and updates of AdamW's size (arXiv 2502.16982).

    Args:
        groups: matrices, with `lr`, `weight_decay` and `momentum`.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    state, momentum = self.state[parameter], group["momentum"]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                    state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                    updates.append(parameter.grad.lerp(state["momentum_buffer"], momentum))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5  # the size of AdamW's updates
                for parameter, update in zip(parameters, orthogonalize(torch.stack(updates))):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-rate)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices `[n, rows, columns]` made nearly orthogonal by Newton-Schulz iterations, in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16().mT if tall else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups with `muon`, AdamW for the others, as one optimizer with one state.

    Args:
        groups: parameter groups, at least one of each kind.
        betas, eps: of AdamW.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        super().__init__(groups, {})
        self.muon = Muon(self._groups(True))
        self.adamw = torch.optim.AdamW(self._groups(False), betas=betas, eps=eps)

    def _groups(self, muon: bool) -> list[dict]:
        return [group for group in self.param_groups if group.get("muon", False) == muon]

    def step(self, closure=None) -> None:
        for optimizer, muon in ((self.muon, True), (self.adamw, False)):
            # loading a state replaces both
            optimizer.state, optimizer.param_groups = self.state, self._groups(muon)
            optimizer.step()


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
            # the Trainer may have moved the model to a GPU since
            self.weights[name] = self.weights[name].to(parameter.device).lerp_(parameter.float(), 1 - decay)
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
