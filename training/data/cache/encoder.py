"""The frozen encoder as the cache needs it: loading, what identifies it, batches of pixels to features, storage types."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from PIL import Image

from blipren.training.engine.device import choose_device
from blipren.training.errors import UserError

STORAGE = {"float16": np.float16, "float32": np.float32, "int8": np.int8}
PIXEL_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
_VOLATILE = ("_processor_class", "processor_class", "auto_map", "image_processor_type", "_commit_hash", "device")


def weights_hash(module: torch.nn.Module) -> str:
    """32 hex digits over names and values of a module's weights; the same in any precision that holds them exactly."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            tensor = tensor.detach().to(torch.float32)
        digest.update(tensor.cpu().contiguous().view(-1).numpy().view(np.uint8))
    return digest.hexdigest()


def encoder_fingerprint(model: torch.nn.Module, image_processor: Any) -> dict[str, Any]:
    """What decides the patch features: weights, revision, preprocessing with its backend, layer, precision."""
    config = model.config
    base = (getattr(config, "base_models", None) or {}).get("vision") or {}
    preprocessing = {key: value for key, value in image_processor.to_dict().items() if key not in _VOLATILE}
    tower = model.model.vision_tower
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
    }


def first_difference(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two fingerprints differ, with both values; ids do not count, where weights are equal."""
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


class Encoder:
    """Pixels to patch features on one device.

    Args:
        model: a BLIPren model; only its vision tower is kept and moved.
        image_processor: the processor's image processor, the one place that resizes.
        precision: to compute in; `auto` is the checkpoint's own, and float32 on a CPU, where half precision is three
            times slower.
    """

    def __init__(self, model: torch.nn.Module, image_processor: Any, device: str = "auto", precision: str = "auto"):
        self.image_processor = image_processor
        self.fingerprint = encoder_fingerprint(model, image_processor)
        self.device = torch.device(choose_device(device))
        self._model = model
        tower = model.model.vision_tower
        if precision == "auto":
            dtype = torch.float32 if self.device.type == "cpu" else tower.dtype
        else:
            dtype = getattr(torch, precision)
        self.precision = str(dtype).removeprefix("torch.")
        tower.to(self.device, dtype).eval()
        self.variable = "pixel_attention_mask" in getattr(image_processor, "model_input_names", ())
        self.hidden_size = model.config.vision_hidden_size

    def measure(self) -> int:
        """Patches of an image, from one blank one."""
        blank = self.image_processor(images=[Image.new("RGB", (320, 240))], return_tensors="pt")
        return self({name: blank[name] for name in PIXEL_INPUTS if name in blank})[0].shape[1]

    @torch.inference_mode()
    def __call__(self, pixels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(features [n, num_patches, width], mask [n, num_patches] or None)` on the encoder's device."""
        inputs = {name: pixels[name].to(self.device, non_blocking=True) for name in PIXEL_INPUTS if name in pixels}
        features = self._model.encode_images(**inputs)
        return features, inputs.get("pixel_attention_mask")


def to_storage(features: torch.Tensor, dtype: str, names: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Features `[n, num_patches, width]` as stored, and for int8 the scale of each token `[n, num_patches]`.

    Raises:
        UserError: NaN, infinity, or values beyond what `dtype` holds; names the first such row.
    """
    features = features.detach()
    peak = features.float().abs().amax(dim=(1, 2)).cpu()  # one pass; NaN stays NaN
    limit = 65504.0 if dtype == "float16" else torch.finfo(torch.float32).max
    good = peak <= limit
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        value = float(peak[row])
        if np.isfinite(value):
            raise UserError(
                f"row {names[row]}: a feature of {value:.4g} is beyond float16; embed with --dtype float32"
            )
        raise UserError(
            f"row {names[row]}: the encoder gives NaN or infinite features; try another encoder precision "
            "(float32), or take this image out"
        )
    if dtype == "int8":
        features = features.float()
        scale = features.abs().amax(dim=-1) / 127
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return (features / scale[..., None]).round().to(torch.int8).cpu().numpy(), scale.cpu().numpy()
    return features.to(getattr(torch, dtype)).cpu().contiguous().numpy(), None


def library_versions() -> dict[str, str]:
    """Versions that can change pixels or features; kept in the cache, not compared."""
    import datasets
    import PIL

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "datasets": datasets.__version__,
    }
