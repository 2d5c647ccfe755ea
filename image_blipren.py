"""Image inputs: a resize that is faster than Pillow's, and a check of images given as paths or addresses."""

import inspect
import os

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension

# Pillow's numbers of its filters -> torch's names
_MODES = {2: "bilinear", 3: "bicubic"}


class BliprenFastResize:
    """Mixin that resizes for a Pillow-backed image processor, in about a quarter of the time.

    Pillow copies the array into an image and back; torch applies the same antialiased filter to the bytes of the array.
    Pixels differ by at most 1 of 255. Arrays of other types, other filters, other kinds of size and images below 32
    pixels are resized by the processor's own method.
    """

    resize_backend = "torch_uint8"

    def resize(self, image: np.ndarray, size, resample=None, reducing_gap: int | None = None, **kwargs) -> np.ndarray:
        """Resize `(channels, height, width)` bytes, with the arguments of the processor's own `resize`."""
        mode = _MODES.get(2 if resample is None else int(getattr(resample, "value", resample)))
        exact = size.height and size.width and not (size.shortest_edge or size.longest_edge or size.max_height)
        shortest = size.shortest_edge and not size.longest_edge
        if min(image.shape[-2:]) < 32:  # strong enlargement of narrow images: rounding differs by 2
            mode = None
        if mode is None or image.dtype != np.uint8 or image.ndim != 3 or reducing_gap or not (exact or shortest):
            if reducing_gap:
                kwargs["reducing_gap"] = reducing_gap
            return super().resize(image, size, resample=resample, **kwargs)
        new_size = (size.height, size.width)
        if shortest:
            new_size = get_resize_output_image_size(
                image, size=size.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
            )
        if tuple(new_size) == image.shape[-2:]:
            return image
        if not image.flags.writeable:  # torch warns about arrays that it cannot write to
            image = image.copy(order="K")
        resized = F.interpolate(torch.from_numpy(image)[None], size=tuple(new_size), mode=mode, antialias=True)
        return resized[0].numpy()

    def normalize(self, image: np.ndarray, mean, std, **kwargs) -> np.ndarray:
        """Return `(image - mean) / std` of `(channels, height, width)` floats, without transformers' two transposes."""
        if image.dtype != np.float32 or image.ndim != 3:
            return super().normalize(image, mean, std, **kwargs)
        shape = (-1, 1, 1)
        image = image - np.asarray(mean, dtype=np.float32).reshape(shape)
        image /= np.asarray(std, dtype=np.float32).reshape(shape)
        return image

    def __reduce__(self):
        return _rebuild, (importable_class(type(self)), self.__dict__)


def importable_class(made: type) -> type:
    """Return the class of transformers that a class made here extends: pickle finds it by its name."""
    return next(c for c in reversed(made.__mro__) if (made.__module__, made.__name__) == (c.__module__, c.__name__))


def _rebuild(original: type, state: dict):
    image_processor = original.__new__(original)
    image_processor.__dict__.update(state)
    return with_fast_resize(image_processor)


def with_fast_resize(image_processor):
    """Add the fast resize to a Pillow-backed image processor, in place; return any other one unchanged."""
    original = type(image_processor)
    if getattr(image_processor, "backend", None) != "pil" or issubclass(original, BliprenFastResize):
        return image_processor
    if list(inspect.signature(original.resize).parameters)[3:5] != ["resample", "reducing_gap"]:
        return image_processor  # a resize with other arguments, such as ConvNeXt's crop_pct
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    image_processor.__class__ = type(original.__name__, (BliprenFastResize, original), names)
    return image_processor


def check_image_sources(images) -> None:
    """Refuse paths and addresses as images if the environment has `BLIPREN_IMAGES=data`, for servers.

    A string must then be a `data:` address, which contains the image. A path would be read from the server's disk, an
    address fetched from the server's network.

    Raises:
        ValueError: for a path or address.
    """
    if os.environ.get("BLIPREN_IMAGES", "any") == "any" or images is None:
        return
    for image in images if isinstance(images, (list, tuple)) else [images]:
        if isinstance(image, (list, tuple)):
            check_image_sources(image)
        elif isinstance(image, (str, os.PathLike)) and not str(image).startswith("data:image/"):
            raise ValueError(
                f"image {str(image)[:80]!r} is refused: with BLIPREN_IMAGES=data this server takes only images inside the "
                "request, as data:image/png;base64,..."
            )


__all__ = ["BliprenFastResize", "check_image_sources", "with_fast_resize"]
