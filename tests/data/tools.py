"""Small pictures with real bytes, writers of the data set shapes that are in use, and the command in this process."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth, distinct RGB picture: JPEG keeps it, and no two seeds are near duplicates."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), "RGB").resize(
        size, Image.Resampling.BICUBIC
    )


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def write_folder(folder, rows: list[dict], pictures: dict[str, bytes], name: str = "metadata.jsonl"):
    """A folder of images with metadata."""
    for path, data in pictures.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_tar(path, samples: dict[str, dict[str, bytes]]):
    """A WebDataset tar: `{key: {extension: bytes}}`."""
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def make_model(folder, vision, llm, **options):
    """An untrained checkpoint as `blipren new` writes it."""
    from blipren.training.commands.new import NewSettings
    from blipren.training.commands.new import run as new
    from tests.tiny_models import QFORMER

    new(NewSettings(out=str(folder), vision=str(vision), llm=str(llm), queries=4, qformer=QFORMER, **options))
    return folder


def run_embed(model, dataset, cache, **options):
    """`blipren embed` in this process, without workers unless asked for; gives the opened cache."""
    from blipren.training.commands.embed import EmbedSettings
    from blipren.training.commands.embed import run as embed
    from blipren.training.data.cache import FeatureCache

    settings = {"workers": 0, "batch_size": 4, "rows_per_shard": 8, "device": "cpu"} | options
    assert not embed(EmbedSettings(model=str(model), dataset=str(dataset), cache=str(cache), **settings))
    return FeatureCache.open(cache)
