"""One run of `blipren reranker`: a small network learns which n-grams people write of an image.

A plain loop and no Trainer: it takes a minute on one device, so that there is nothing to resume or to distribute.
"""

from __future__ import annotations

import math
import time

import torch
from torch.nn import functional as F

from blipren.reranker_blipren import FILES, BliprenReranker, RerankerNetwork, RerankerSettings
from blipren.training.commands.reranker import RerankerCommandSettings
from blipren.training.data.cache import FeatureCache
from blipren.training.engine.device import choose_device
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from blipren.training.memory.build import memory_info, read_captions
from blipren.training.reranker.tables import build_tables, coordinates

WARMUP = 20  # steps
SAMPLED = 1000  # images whose patches give mean and standard deviation
SHAPE = {"queries": 4, "hidden": 128, "heads": 4}


def make_reranker(s: RerankerCommandSettings) -> None:
    """Run the command. Raises `UserError` for what the user can repair."""
    begin = time.perf_counter()
    model, processor = load_checkpoint(s.model)
    cache = FeatureCache.open(s.cache)
    cache.check_model(model, processor)
    rows, _, tokens = read_captions(cache, s.split, processor)
    if len(rows) < 2:
        raise UserError(f"{s.cache} has {len(rows)} images with captions in split {s.split}; 2 are needed")
    torch.manual_seed(s.seed)
    tables = build_tables(tokens, s.width)
    ngrams, width = tables["directions"].shape
    print(f"{len(rows):,} images; {ngrams:,} n-grams in {width} directions")
    network = RerankerNetwork(cache.hidden_size, width, **SHAPE).to(choose_device(s.device))
    data = _Data(cache, s.split, rows, coordinates(tokens, tables, len(rows)))
    fit(network, data, s)
    info = {**memory_info(model, processor), "images": len(rows), "shape": network.shape}
    reranker = BliprenReranker(network, tables, info, RerankerSettings())
    out = s.out_folder()
    reranker.save(out)
    validated, _, own = read_captions(cache, "validation", processor)
    if len(validated) > 1 and s.split != "validation":
        unseen = _Data(cache, "validation", validated, coordinates(own, tables, len(rows)))
        explained = explained_variance(network, unseen)
        print(f"explained variance on {len(validated):,} validation images: {explained:.3f}")
    size = sum((out / name).stat().st_size for name in FILES)
    print(f"{size / 2**20:,.1f} MiB, {time.perf_counter() - begin:.1f} s: the reranker is in {out}")


class _Data:
    """Patch features and targets of the rows of a split that have captions."""

    def __init__(self, cache: FeatureCache, split: str, rows: list[int], targets: torch.Tensor):
        self.cache, self.split, self.rows, self.targets = cache, split, torch.tensor(rows), targets

    def __len__(self) -> int:
        return len(self.rows)

    def patches(self, items: torch.Tensor, views: torch.Tensor | None = None):
        """Return patch features `(items, patches, width)` and their mask."""
        views = None if views is None else views.tolist()
        return self.cache.patch_features(self.split, self.rows[items].tolist(), views)


def keep_some(
    patches: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return as many random patches of each image, padding last where an image has fewer.

    Args:
        dropout: share of the longest image's patches that is left out.
    """
    order = torch.rand(patches.shape[:2])
    order = order if mask is None else order.masked_fill(mask == 0, -1.0)
    kept = order.topk(max(1, round(patches.shape[1] * (1 - dropout))), dim=1).indices
    return patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2])), None if mask is None else mask.gather(
        1, kept
    )


def fit(network: RerankerNetwork, data: _Data, s: RerankerCommandSettings) -> None:
    """Train the network: squared errors of the coordinates, AdamW with a half cosine."""
    device, scale = network.queries.device, data.targets.std()
    some, mask = data.patches(torch.randperm(len(data))[:SAMPLED])
    some = some.flatten(0, 1) if mask is None else some[mask.bool()]
    network.mean.copy_(some.mean(dim=0))
    network.std.copy_(some.std(dim=0).clamp_min(1e-6))
    optimizer = torch.optim.AdamW(network.parameters(), lr=s.learning_rate, weight_decay=0.05)
    losses = torch.zeros(0)
    network.train()
    for step in range(s.max_steps):
        items = torch.randint(len(data), (s.batch_size,))
        views = torch.randint(data.cache.views, (s.batch_size,))
        patches, mask = keep_some(*data.patches(items, views), s.feature_dropout)
        predicted = network(patches.to(device), None if mask is None else mask.to(device))  # [images, width]
        loss = F.mse_loss(predicted, data.targets[items].to(device) / scale)
        loss.backward()
        for group in optimizer.param_groups:
            decay = 0.5 + 0.5 * math.cos(math.pi * step / s.max_steps)
            group["lr"] = s.learning_rate * min(1.0, (step + 1) / WARMUP) * decay
        optimizer.step()
        optimizer.zero_grad()
        losses = torch.cat([losses, loss.detach().cpu()[None]])[-100:]
        if not loss.isfinite():
            raise UserError(f"the loss of step {step + 1} is {loss.item()}: lower --learning-rate {s.learning_rate}")
        if (step + 1) % 100 == 0 or step + 1 == s.max_steps:
            print(
                f"step {step + 1}/{s.max_steps}  loss {losses.mean().item():.4f} of the targets' variance", flush=True
            )
    network.eval()
    with torch.no_grad():  # the last layer predicts in the targets' own unit
        network.mlp[-1].weight.mul_(scale.to(device))
        network.mlp[-1].bias.mul_(scale.to(device))


@torch.no_grad()
def explained_variance(network: RerankerNetwork, data: _Data) -> float:
    """Return the share of the variance of the coordinates that the network explains."""
    device, errors = network.queries.device, 0.0
    for items in torch.arange(len(data)).split(256):
        patches, mask = data.patches(items)
        predicted = network(patches.to(device), None if mask is None else mask.to(device)).cpu()
        errors += F.mse_loss(predicted, data.targets[items], reduction="sum").item()
    variance = (data.targets - data.targets.mean(dim=0)).square().sum().clamp_min(1e-12)  # captions may be all equal
    return 1 - errors / variance.item()
