"""What decides the content of a cache, and where two such fingerprints differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
import xxhash

from blipren.training.data.sources.caption_filter import CaptionFilter
from blipren.training.errors import UserError

if TYPE_CHECKING:
    from blipren.training.commands.embed import EmbedSettings
    from blipren.training.data.cache.encoder import Encoder
    from blipren.training.data.sources.rows import Source

# entries of a preprocessor configuration that do not change pixels
_IRRELEVANT = ("_processor_class", "processor_class", "auto_map", "image_processor_type", "_commit_hash", "device")


def weights_hash(module: torch.nn.Module) -> str:
    """Return 32 hex digits over names and values of a module's weights.

    They are the same in every precision that holds the values exactly.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            tensor = tensor.detach().to(torch.float32)
        digest.update(tensor.cpu().contiguous().view(-1).numpy().view(np.uint8))
    return digest.hexdigest()


def encoder_fingerprint(model: torch.nn.Module, image_processor: Any) -> dict[str, Any]:
    """Return what decides the patch features: weights, revision, preprocessing with its backend, layer, precision."""
    config = model.config
    base = (getattr(config, "base_models", None) or {}).get("vision") or {}
    preprocessing = {key: value for key, value in image_processor.to_dict().items() if key not in _IRRELEVANT}
    tower = model.model.vision_tower
    # named only where there are any: a cache of one encoder at one scale stays what it was
    more: dict[str, Any] = {}
    if config.vision_scales != [1]:
        more |= {"vision_scales": config.vision_scales, "vision_join": config.vision_join}
    if config.vision_tiles is not None:
        more["vision_tiles"] = config.vision_tiles
    if config.second_vision_config is not None:
        more["second_vision_weights"] = weights_hash(model.model.second_vision_tower)
    if config.has_frame_times:
        more["frame_times"] = "seconds"
    return {
        "vision_id": base.get("id"),
        "vision_revision": base.get("revision"),
        "vision_weights": weights_hash(tower),
        "preprocessing": preprocessing,
        "preprocessing_backend": f"{type(image_processor).__name__} {getattr(image_processor, 'resize_backend', 'own')}",
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select": config.vision_feature_select,
        "num_prefix_tokens": config.num_prefix_tokens,
        "encoder_dtype": str(tower.dtype).removeprefix("torch."),
        **more,
    }


def cache_fingerprint(s: EmbedSettings, source: Source, encoder: Encoder) -> dict[str, Any]:
    """Return everything that decides the content of a cache, and nothing else."""
    return {
        "encoder": encoder.fingerprint,
        "storage": {
            "dtype": s.dtype,
            "computed_in": encoder.precision,
            "views": s.views,
            **({"view_scale": s.view_scale, "view_flip": s.view_flip} if s.views > 1 else {}),
            "rows_per_shard": s.rows_per_shard,
            "batch_size": s.batch_size,
        },
        "source": {"dataset": source.fingerprint, "columns": source.columns.describe(), "limit": s.limit}
        | ({"follow_links": True} if s.follow_links else {})
        | ({"max_tokens": s.max_tokens, "cut_turns": s.cut_turns} if source.has_conversations else {})
        | ({"grounding": sorted(s.grounding), "bbox_format": s.bbox_format} if s.grounding else {}),
        "splits": {
            "validation_share": s.validation_share,
            "test_share": s.test_share,
            "near_duplicates": s.near_duplicates,
        },
        "captions": CaptionFilter.from_settings(s).as_dict()
        | {"min_similarity": s.min_similarity, "keep_best": s.keep_best},
    }


def first_difference(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """Return the first field in which two fingerprints differ, with both values.

    The encoder's id is not compared, since its weights are; nor is a revision that one side does not know.
    """
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if key == "vision_id" or (key == "vision_revision" and (mine is None or other is None)):
            continue
        if isinstance(mine, dict) and isinstance(other, dict):
            if found := first_difference(mine, other, f"{prefix}{key}."):
                return found
        elif mine != other:
            return prefix + key, mine, other
    return None


def as_stored(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return a fingerprint as it is when read back from JSON."""
    return json.loads(json.dumps(fingerprint, default=str))


def check_same_fingerprint(stored: dict[str, Any], now: dict[str, Any], folder: Path | str) -> None:
    """Raise `UserError` that names the first field in which the fingerprint of a folder differs from this command's."""
    if found := first_difference(as_stored(stored), as_stored(now)):
        field, old, new = found
        raise UserError(
            f"{folder} was made with {field} = {old!r}, and now it is {new!r}: "
            "choose another folder, or remove this one"
        )


def library_versions() -> dict[str, str]:
    """Return the versions of libraries that can change pixels or features. A cache names them; they are not compared."""
    import datasets
    import PIL

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "datasets": datasets.__version__,
    }
