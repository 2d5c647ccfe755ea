"""From foreign bytes to RGB pixels as a viewer shows them, or an `ImageError` with the reason.

`PIL.Image.convert("RGB")` alone shows what transparency hides, saturates 16-bit greys and ignores EXIF rotation.
This module is the one place where pictures are decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# PIL refuses 179 megapixels and only warns above half of that; here the warning's limit is the limit.
MAX_PIXELS = 89_478_485
# A processor that resizes the shorter edge would turn 30000x1 into 7,680,000x256.
MAX_ASPECT_RATIO = 200
Image.init()  # registers every format; of them only plain raster formats are opened: EPS would run Ghostscript
_WANTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # AVIF and JPEG 2000 are optional in Pillow builds
_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.\-]*:(//|(?=/))")


class ImageError(Exception):
    """A picture that cannot be used. `reason` is a short word that is counted, `detail` says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Folder:
    """The files that the rows of a data set may name. Rows are foreign input: they name no file elsewhere, no address.

    Args:
        root: folder that relative paths start from and may not leave; None: no relative path is read.
        absolute_roots: folders in which absolute paths are read, for the paths of `datasets`' own listing.
        remote_prefix: `hf://datasets/ID`, which streaming from the Hub uses for the data set's own files.
        link_root: folder that symbolic links in `root` may not leave; `root` itself by default.
        follow_links: read symbolic links that lead out of these folders.
    """

    root: str | None = None
    absolute_roots: tuple[str, ...] = ()
    remote_prefix: str | None = None
    link_root: str | None = None
    follow_links: bool = False

    def resolve(self, path: str) -> Path:
        """Return the file that `path` names. Raises `ImageError` for one outside the folders."""
        if _SCHEME.match(path):
            raise ImageError("remote_path", f"{path[:200]} is an address, and only files of the data set are read")
        if "\0" in path or not path:
            raise ImageError("missing_file", f"{path[:200]!r} is no file name")
        if os.path.isabs(path) or re.match(r"^([a-zA-Z]:)?[\\/]", path):
            full, roots = Path(os.path.normpath(path)), self.absolute_roots
            if not any(full.is_relative_to(os.path.abspath(root)) for root in roots):
                raise ImageError(
                    "outside_folder", f"{path[:200]} is absolute; paths are relative to the data set's folder"
                )
        elif self.root is None:
            raise ImageError("outside_folder", f"{path[:200]}: this data set has no folder of files")
        else:
            base, roots = Path(os.path.abspath(self.root)), (self.link_root or self.root,)
            full = Path(os.path.normpath(base / path))
            if not full.is_relative_to(base):
                raise ImageError("outside_folder", f"{path[:200]} leaves the folder {base.name}")
        if not self.follow_links and is_link_out_of(full, roots):
            raise ImageError("outside_link", f"{path[:200]} is a link out of the folder; --follow-links reads it")
        return full


def is_link_out_of(path: Path, roots: Iterable[str]) -> bool:
    """Return whether `path`, which lies in one of the folders by its name, is a file outside of all of them."""
    real = Path(os.path.realpath(path))
    return not any(real.is_relative_to(os.path.realpath(root)) for root in roots)


def read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises `ImageError` for none, and for pipes, sockets and devices without opening them."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError("no_regular_file", f"{path.name} is a folder, pipe, socket or device")
        return path.read_bytes()
    except OSError as error:
        raise ImageError("missing_file", f"{path.name}: {error.strerror or error}") from error


def _why_not_an_image(data: bytes) -> ImageError:
    start = data[:2048].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data.strip(b"\0"):
        return ImageError("empty", f"{len(data)} bytes, none of them set")
    if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in start):
        return ImageError("svg", "a vector drawing; render it to PNG first")
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return ImageError("html", "a web page where a picture should be")
    return ImageError("unreadable", f"{len(data):,} bytes of no known picture format")


def _broken(error: Exception) -> ImageError:
    """Return the reason for a picture that a decoder refuses. Decoders' messages quote the file, so none is taken over."""
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return ImageError("truncated", "the file ends before the picture does")
    return ImageError("unreadable", f"damaged ({type(error).__name__} in its decoder)")


def _grey_from_wide(values: np.ndarray) -> Image.Image:
    """Convert 16- and 32-bit integer or float greys `[height, width]` to 8 bits by their range, without clipping."""
    if not np.isfinite(values).all():
        raise ImageError("not_finite", "the picture holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    unit_range = np.issubdtype(values.dtype, np.floating) and 0 <= low and high <= 1
    values = values.astype(np.float64)
    if unit_range:
        values = values * 255
    elif low < 0 or high > 255:
        values = (values - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(np.rint(values).astype(np.uint8), "L")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded PIL image in any mode to `RGB`; transparent parts are composited on white."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I;16"):  # 16-bit greys: the full range is 65535, whatever range the picture uses
        wide = np.asarray(image).astype(np.uint16)
        image = Image.fromarray(((wide.astype(np.uint32) + 128) // 257).astype(np.uint8), "L")
    elif mode == "I":
        wide = np.asarray(image)
        if wide.min() >= 0 and 255 < wide.max() <= 65535:
            image = Image.fromarray(((wide.astype(np.uint32) + 128) // 257).astype(np.uint8), "L")
        else:
            image = _grey_from_wide(wide)
    elif mode == "F":
        image = _grey_from_wide(np.asarray(image))
    elif mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image if mode == "RGBA" else image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(page, rgba)
    return image.convert("RGB")


def decode_image(
    source: bytes | Image.Image, max_pixels: int = MAX_PIXELS, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> Image.Image:
    """Decode encoded bytes, or convert a PIL image, to an upright 8-bit `RGB` PIL image.

    Rotated by its EXIF tag, composited on white, the first frame of an animation, 16-bit and float greys by their
    range. Raises `ImageError` for what is no picture, is cut short, or is too large (`max_pixels`) or too narrow
    (`max_aspect_ratio`) to be one.
    """
    if isinstance(source, Image.Image):
        image = source
    else:
        if not source:
            raise ImageError("empty", "0 bytes")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below, as an error
                image = Image.open(io.BytesIO(source), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ImageError("too_large", str(error)) from error
        except UnidentifiedImageError as error:
            raise _why_not_an_image(source) from error
        except Exception as error:  # decoders raise nearly anything for foreign bytes
            raise _broken(error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}x{height} has more than {max_pixels:,} pixels")
    if max(width, height) > max_aspect_ratio * max(1, min(width, height)):
        raise ImageError("aspect_ratio", f"{width}x{height} is narrower than 1 to {max_aspect_ratio:g}")
    try:
        image.load()
    except Exception as error:  # as above
        raise _broken(error) from error
    try:
        if image is source:  # the caller's image is not changed
            image = ImageOps.exif_transpose(image)
        else:
            ImageOps.exif_transpose(image, in_place=True)
    except (struct.error, ValueError, TypeError, SyntaxError, KeyError, OSError):
        pass  # a broken EXIF block has no rotation; the pixels are not affected
    return to_rgb(image)


def image_bytes(value: Any, folder: Folder = Folder()) -> bytes | Image.Image:
    """Return the undecoded image of a cell: bytes, `{"bytes", "path"}`, a path in `folder`, or a PIL image.

    Raises:
        ImageError: there is none, or it may not be read.
    """
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        value = value.get("path")
    if value is None:
        raise ImageError("no_image", "the image cell is empty")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return Image.fromarray(value)
    if not isinstance(value, (str, os.PathLike)):
        raise ImageError("no_image", f"an image cell of type {type(value).__name__}")
    value = os.fspath(value)
    if folder.remote_prefix is not None and value.startswith(folder.remote_prefix):
        import fsspec

        with fsspec.open(value, "rb") as stream:
            return stream.read()
    return read_file(folder.resolve(value))


def hash_file(path: Path) -> str:
    """Return 32 hex digits of a file's bytes, as `content_hash` does. Raises `ImageError` where it cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError("no_regular_file", f"{path.name} is a folder, pipe, socket or device")
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise ImageError("missing_file", f"{path.name}: {error.strerror or error}") from error


def content_hash(data: bytes | Image.Image) -> str:
    """Return 32 hex digits of the image content: of its encoded bytes, or of mode, size and pixels of a PIL image."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(data, Image.Image):
        digest.update(f"{data.mode}{data.size}".encode())
        data = data.tobytes()
    digest.update(data)
    return digest.hexdigest()
