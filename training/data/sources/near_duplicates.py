"""Pictures that are nearly the same: a perceptual hash finds candidates, thumbnails confirm them."""

from __future__ import annotations

import numpy as np
from PIL import Image

THUMB = 16  # edge of the thumbnail that confirms a near duplicate
HASH_DISTANCE = 6  # of 64 bits of the perceptual hash
THUMB_MEAN_DIFFERENCE = 5.0  # of 255: recompression and resizing stay below 3
THUMB_MAX_DIFFERENCE = 40  # of 255: one object of another colour or place exceeds it

_COSINES = np.cos(np.pi / 32 * (np.arange(32) + 0.5)[None, :] * np.arange(8)[:, None])  # DCT-II, 8 lowest frequencies


def perceptual_hash(image: Image.Image) -> int:
    """Return 64 bits: whether each of the lowest 8x8 DCT coefficients of the 32x32 grey image is above their median (pHash)."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    low[0] = np.median(low[1:])  # the mean brightness is not compared
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return the image in 16x16 pixels, uint8 `[16, 16, 3]`, to confirm candidates of the perceptual hash."""
    return np.asarray(image.convert("RGB").resize((THUMB, THUMB), Image.Resampling.BOX), dtype=np.uint8)


def image_signature(image: Image.Image) -> tuple[int, np.ndarray]:
    """Return `(perceptual_hash, thumbnail)` of an RGB image."""
    # both start from one cheap reduction, since two resizes of the full size would take longer than decoding
    factor = min(image.size) // 128
    small = image.reduce(factor) if factor > 1 else image
    return perceptual_hash(small), thumbnail(small)


class NearIndex:
    """Index that finds near duplicates of pictures.

    A candidate differs in at most `distance` bits of the perceptual hash. Thumbnails confirm it, since different drawn
    scenes and documents may have the same hash.

    Args:
        hashes: uint64 `[pictures]`.
        thumbs: uint8 `[pictures, 16, 16, 3]`.
    """

    def __init__(self, hashes: np.ndarray, thumbs: np.ndarray, distance: int = HASH_DISTANCE):
        self.hashes, self.thumbs, self.distance = hashes, thumbs, distance
        # of distance + 1 pieces of the hash at least one is equal, so that only pictures that share one are compared
        edges = np.linspace(0, 64, distance + 2).astype(int)
        self._pieces = []
        for low, high in zip(edges[:-1], edges[1:]):
            piece = self._piece(hashes, low, high)
            order = np.argsort(piece, kind="stable")
            self._pieces.append((low, high, order, piece[order]))

    @staticmethod
    def _piece(hashes: np.ndarray, low: int, high: int) -> np.ndarray:
        return (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)

    def find(self, hashes: np.ndarray, thumbs: np.ndarray) -> dict[int, int]:
        """Return, for each given picture that is nearly one of the index, its number -> the number of the first such one."""
        found: dict[int, int] = {}
        if not len(hashes) or not len(self.hashes):
            return found
        pairs = []
        for low, high, order, ordered in self._pieces:
            own = self._piece(hashes, low, high)
            starts = np.searchsorted(ordered, own, "left")
            counts = np.searchsorted(ordered, own, "right") - starts
            for begin in range(0, len(own), 1024):  # in parts, since common pieces make many candidates
                part = slice(begin, begin + 1024)
                mine = np.repeat(np.arange(len(own))[part], counts[part])
                if not len(mine):
                    continue
                offsets = np.arange(len(mine)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
                theirs = order[np.repeat(starts[part], counts[part]) + offsets]
                near = np.bitwise_count(hashes[mine] ^ self.hashes[theirs]) <= self.distance
                if near.any():
                    pairs.append(np.stack([mine[near], theirs[near]], axis=1))
        if not pairs:
            return found
        candidates = np.unique(np.concatenate(pairs), axis=0)
        for begin in range(0, len(candidates), 4096):
            mine, theirs = candidates[begin : begin + 4096].T
            gap = np.abs(thumbs[mine].astype(np.int16) - self.thumbs[theirs].astype(np.int16))
            gap = gap.reshape(len(gap), -1)
            same = (gap.mean(axis=1) <= THUMB_MEAN_DIFFERENCE) & (gap.max(axis=1) <= THUMB_MAX_DIFFERENCE)
            for index, other in zip(mine[same].tolist(), theirs[same].tolist()):
                found.setdefault(index, other)
        return found
