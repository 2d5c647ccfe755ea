"""An image in pieces that a vision encoder takes one by one: higher resolutions of it (scales), or tiles of its shape."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict

from .image_blipren import importable_class, with_fast_resize


def choose_tile_grid(width: int, height: int, max_tiles: int, piece_ratio: float = 1.0) -> tuple[int, int]:
    """Return rows and columns of the grid of at most `max_tiles` tiles whose shape is nearest to the image's.

    Of grids with an equal shape it is the largest one. `(1, 1)` means that the overview is enough.

    Args:
        piece_ratio: width of a tile divided by its height.
    """
    wanted = math.log(width / height)
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    return min(grids, key=lambda g: (round(abs(math.log(g[1] * piece_ratio / g[0]) - wanted), 6), -g[0] * g[1]))


def cut_pieces(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Cut `(channels, rows * height, columns * width)` into `(rows * columns, channels, height, width)`, in reading order."""
    channels, height, width = image.shape
    parts = image.reshape(channels, rows, height // rows, columns, width // columns)
    return parts.transpose(1, 3, 0, 2, 4).reshape(rows * columns, channels, height // rows, width // columns)


class BliprenPieces:
    """Mixin of an image processor that gives `pixel_values` `(num_images, num_pieces, channels, height, width)`.

    Its settings are attributes of the image processor, saved with it:

        scales: each is the image at that many times the encoder's own input size, in pieces of that size.
        tiles: or the grid of at most so many tiles that fits the image's shape best, behind an overview. Images with fewer
            tiles are padded: `pixel_attention_mask` `(num_images, num_patches)` is 1 for patches that are there, and
            `spatial_shapes` `(num_images, 2)` has rows and columns of the grid.
        tile_patches: patches of a tile.
        second: settings of the image processor of a second encoder, which gives `second_pixel_values`.
    """

    def preprocess(self, images, **kwargs) -> BatchFeature:
        """Preprocess images as the encoder's own image processor does, piece by piece, for one or two encoders."""
        images = self._prepare_images_structure(images)
        outputs = super().preprocess(images, **kwargs)
        if self.second is not None:
            given = {key: kwargs[key] for key in ("return_tensors",) if key in kwargs}
            outputs["second_pixel_values"] = self.second_image_processor.preprocess(images, **given)["pixel_values"]
        return outputs

    def _preprocess(self, images, size, crop_size, do_center_crop=False, **kwargs) -> BatchFeature | list[np.ndarray]:
        # those of encoders that segment too (MobileNetV2, BEiT) take no return_tensors here and give the arrays alone
        alone = "return_tensors" not in kwargs
        return_tensors = kwargs.pop("return_tensors", None)

        def resize_to(images, **sizes) -> list[np.ndarray]:
            sizes = {"size": size, "crop_size": crop_size, "do_center_crop": do_center_crop} | sizes
            sizes |= {} if alone else {"return_tensors": None}
            made = super(BliprenPieces, self)._preprocess(images, **sizes, **kwargs)
            return [np.asarray(image) for image in (made if alone else made["pixel_values"])]

        base = resize_to(images)
        pixels = [image[None] for image in base]
        if not self.tiles:
            for scale in self.scales[1:]:
                larger = resize_to(images, size=_times(size, scale), crop_size=_times(crop_size, scale))
                for number, (small, large) in enumerate(zip(base, larger)):
                    if large.shape != (small.shape[0], scale * small.shape[1], scale * small.shape[2]):
                        raise ValueError(
                            f"{type(self).__name__} gives {small.shape} at scale 1 and {large.shape} at scale {scale}: its "
                            "images have no fixed size, so that they cannot be cut into pieces"
                        )
                    pixels[number] = np.concatenate([pixels[number], cut_pieces(large, scale, scale)])
            if len(self.scales) == 1:
                pixels = base
            return pixels if alone else BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)
        if alone:
            raise ValueError(f"{type(self).__name__} gives arrays without masks, and tiles need a mask: use scales")
        masks, grids = [], []
        for number, (image, overview) in enumerate(zip(images, base)):
            _, height, width = overview.shape
            rows, columns = choose_tile_grid(image.shape[2], image.shape[1], self.tiles, width / height)
            pieces = np.zeros((1 + self.tiles, *overview.shape), overview.dtype)
            pieces[0] = overview
            count = 1
            if rows * columns > 1:
                count += rows * columns
                exact = {"size": SizeDict(height=rows * height, width=columns * width), "do_center_crop": False}
                pieces[1:count] = cut_pieces(resize_to([image], **exact)[0], rows, columns)
            pixels[number] = pieces
            place = np.arange((1 + self.tiles) * self.tile_patches)
            masks.append((place < count * self.tile_patches).astype(np.int64))
            grids.append(np.array([rows, columns]))
        data = {"pixel_values": pixels, "pixel_attention_mask": masks, "spatial_shapes": grids}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def __reduce__(self):
        return _rebuild, (importable_class(type(self)), self.__dict__)

    def to_dict(self) -> dict:
        """Return the settings as they are saved; those of the second image processor are in `second`."""
        settings = super().to_dict()
        settings.pop("second_image_processor", None)
        return settings


def _times(size: SizeDict | None, factor: int) -> SizeDict | None:
    """Return a size with every edge multiplied."""
    return None if size is None else SizeDict(**{key: factor * value for key, value in dict(size).items()})


def _rebuild(original: type, state: dict):
    image_processor = original.__new__(original)
    image_processor.__dict__.update(state)
    return with_pieces(with_fast_resize(image_processor))


def load_image_processor_settings(settings: dict):
    """Make an image processor of saved settings, as `AutoImageProcessor` does of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder)


def with_pieces(image_processor):
    """Let an image processor with settings for scales, tiles or a second encoder give pieces, in place.

    Any other one is returned unchanged.
    """
    original = type(image_processor)
    scales, tiles, second = (getattr(image_processor, name, None) for name in ("scales", "tiles", "second"))
    if (scales in (None, [1]) and not tiles and second is None) or issubclass(original, BliprenPieces):
        return image_processor
    image_processor.scales, image_processor.tiles, image_processor.second = scales or [1], tiles, second
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    more = ["pixel_attention_mask", "spatial_shapes"] if tiles else []
    more += ["second_pixel_values"] if second is not None else []
    names["model_input_names"] = ["pixel_values", *more]
    image_processor.__class__ = type(original.__name__, (BliprenPieces, original), names)
    if second is not None and not hasattr(image_processor, "second_image_processor"):
        own = load_image_processor_settings(second)
        own.scales, own.tiles, own.tile_patches = image_processor.scales, tiles, 1
        image_processor.second_image_processor = with_pieces(with_fast_resize(own))
    return image_processor


# ---- behind the vision encoder ------------------------------------------------------------------------------------


def join_pieces(features: torch.Tensor, grid: tuple[int, int], scales: list[int], join: str) -> torch.Tensor:
    """Join the patch features of an image's pieces.

    Args:
        features: `(num_images, num_pieces, num_patches, width)`.
        grid: rows and columns of the patches of a piece.
        join: `"channels"` puts the pieces of a scale together, averages them down onto the grid of one piece and
            concatenates the scales along the width (S2, https://arxiv.org/abs/2403.13043); `"sequence"` concatenates the
            pieces along the patches.

    Returns:
        `(num_images, num_patches, num_scales * width)`, or `(num_images, num_pieces * num_patches, width)`.
    """
    if join == "sequence":
        return features.flatten(1, 2)
    joined, start = [], 0
    for scale in scales:
        pieces = features[:, start : start + scale * scale]  # [B, s * s, P, D]
        start += scale * scale
        if scale > 1:
            whole = pieces.unflatten(2, grid).unflatten(1, (scale, scale))  # [B, s, s, rows, columns, D]
            whole = whole.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, D, s * rows, s * columns]
            joined.append(F.avg_pool2d(whole, scale).flatten(2).transpose(1, 2))
        else:
            joined.append(pieces[:, 0])
    return torch.cat(joined, dim=-1)


def resize_grid(features: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Interpolate patch features `(n, num_patches, width)` from their grid to another one, bilinear with antialiasing."""
    if tuple(grid) == tuple(new_grid):
        return features
    maps = features.transpose(1, 2).unflatten(2, tuple(grid))
    resized = F.interpolate(maps.float(), size=tuple(new_grid), mode="bilinear", antialias=True).to(features.dtype)
    return resized.flatten(2).transpose(1, 2)


__all__ = [
    "BliprenPieces",
    "choose_tile_grid",
    "cut_pieces",
    "join_pieces",
    "resize_grid",
    "with_pieces",
]
