"""Speed of `blipren embed`, against the bare encoder and against a plain loop, and of reading the cache back.

    python benchmarks/embed.py --encoder mobilenet --out embed.json
    python benchmarks/embed.py --encoder siglip-b --images 96
    python benchmarks/embed.py --encoder siglip-b --images 32 --scales 1 2
    python benchmarks/embed.py --encoder siglip-b --images 16 --frames 8

Every arm embeds the same drawn 640x480 JPEGs, or clips of two seconds (H.264, needs PyAV), with the same random weights. With
scales and frames the bare encoder gets the same number of pieces; figures are images or clips a second. Arms take turns, and each
figure is the median over the rounds. The ratios are the result: absolute figures depend on the machine and its load. On a machine
with other work the ratios of processor seconds are the fairer ones; they count all work of the workers.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    MobileNetV2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    ViTImageProcessorPil,
)

from blipren import BliprenConfig, BliprenForConditionalGeneration
from blipren.image_blipren import with_fast_resize
from blipren.pieces_blipren import with_pieces
from blipren.training.commands.embed import EmbedSettings
from blipren.training.data.cache import FeatureCache
from blipren.training.data.cache.encoder import Encoder
from blipren.training.data.cache.engines.local import embed_units
from blipren.training.data.cache.engines.workers import default_workers
from blipren.training.data.cache.fingerprints import cache_fingerprint
from blipren.training.data.cache.prepare import PrepareConfig
from blipren.training.data.cache.writer.finish import finish_cache
from blipren.training.data.cache.writer.units import CacheWriter
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.engine.memory import keep_freed_memory
from blipren.vision_blipren import measure_vision

ENCODERS = {
    "mobilenet": (lambda: MobileNetV2Config(image_size=224), {"height": 224, "width": 224}),
    "siglip-b": (lambda: SiglipVisionConfig(image_size=224, patch_size=16, vision_use_head=False), None),
}


def draw_photos(folder: Path, count: int, size: tuple[int, int] = (640, 480)) -> None:
    """Draw JPEGs of a width and height with the detail of photos, and write their metadata."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(size, 3)
        noise = rng.normal(0, 8, (*size[::-1], 3))
        pixels = (np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=90)
        lines.append(
            json.dumps({"file_name": f"{number:05d}.jpg", "caption": f"drawn picture {number}", "split": "train"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def draw_clips(folder: Path, count: int) -> None:
    """Write clips of two seconds, 640x480 at 25 frames a second, and their metadata."""
    import av

    lines = []
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = [
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480), 3) for _ in "ab"
        ]
        with av.open(str(folder / f"{number:05d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
            for step in range(50):
                container.mux(stream.encode(av.VideoFrame.from_image(Image.blend(*coarse, step / 49))))
            container.mux(stream.encode())
        lines.append(json.dumps({"file_name": f"{number:05d}.mp4", "caption": f"clip {number}", "split": "train"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def make_model(name: str, scales: list[int], frames: int | None):
    """Return a model with an encoder of real size and random weights, and its image processor."""
    if Path(name).exists():
        vision, processor = AutoConfig.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
    else:
        make, size = ENCODERS[name]
        vision = make()
        processor = ViTImageProcessorPil(size=size) if size else SiglipImageProcessorPil()
    plain = type(processor)(**processor.to_dict())
    shape = measure_vision(vision, dict(processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")))
    config = BliprenConfig(
        vision_config=vision,
        text_config=AutoConfig.for_model(
            "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        ),
        connector="patches",
        projector="linear",
        vision_hidden_size=shape.hidden_size * len(scales),
        vision_scales=scales,
        num_frames=frames,
        num_prefix_tokens=shape.num_prefix_tokens,
        vision_grid=list(shape.grid),
        num_visual_tokens=1,
    )
    processor.scales = scales
    torch.manual_seed(0)
    return BliprenForConditionalGeneration(config).eval(), with_pieces(with_fast_resize(processor)), plain


def clock() -> np.ndarray:
    """Return seconds of the wall clock, and processor seconds of this process and of workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)])


def bare(encoder: Encoder, images: int, batch: int, frames: int = 1) -> np.ndarray:
    """Return images (clips) a second and a processor second of the encoder alone, on pixels in memory.

    Args:
        batch: pieces of a batch.
    """
    pieces = encoder.pieces * frames
    batch = max(1, batch // pieces)
    blank = encoder.image_processor(images=[Image.new("RGB", (64, 64))] * batch * frames, return_tensors="pt")
    pixels = {"pixel_values": blank["pixel_values"].to(encoder.device)}
    started = clock()
    for _ in range(images // batch):
        features, _ = encoder(pixels)
        features.to(torch.float16).cpu()
    return images // batch * batch / (clock() - started)


def plain_loop(encoder: Encoder, processor, photos: list[Path], batch: int) -> np.ndarray:
    """Return the rates of a script that decodes, resizes by transformers' processor and encodes one after the other."""
    started = clock()
    for begin in range(0, len(photos), batch):
        images = [Image.open(path).convert("RGB") for path in photos[begin : begin + batch]]
        features, _ = encoder(dict(processor(images=images, return_tensors="pt")))
        features.to(torch.float16).cpu().numpy()
    return len(photos) / (clock() - started)


def embed(encoder: Encoder, photos: Path, cache: Path, count: int, settings: dict, frames: int | None) -> np.ndarray:
    """Return the rates of `blipren embed` without loading the model: from rows to a finished cache."""
    s = EmbedSettings(model="benchmark", dataset=str(photos), cache=str(cache), **settings)
    source = open_rows(s.dataset)
    config = PrepareConfig(image_processor=encoder.image_processor, num_frames=frames)
    patches = encoder.measure() * (frames or 1)
    cache.mkdir()
    writer = CacheWriter(
        cache,
        cache_fingerprint(s, source, encoder),
        dtype=s.dtype,
        values=patches * encoder.hidden_size,
        tokens=patches,
        hidden_size=encoder.hidden_size,
        rows_per_unit=s.rows_per_shard,
    )
    writer.start()
    started = clock()
    with contextlib.redirect_stderr(io.StringIO()):
        embed_units(s, source, encoder, writer, config)
    seconds = clock() - started
    with contextlib.redirect_stdout(io.StringIO()):
        finish_cache(writer, {"views": 1, "num_patches": patches})
    return count / seconds


def read(cache: FeatureCache, batches: int, batch: int) -> dict[str, float]:
    """Return GB/s of reading stored features in shuffled batches: first pass (checks checksums), later pass, no checks."""
    rows = cache.num_rows("train")
    result = {}
    for name, opened in (("checked", cache), ("unchecked", FeatureCache.open(cache.folder, verify=False))):
        for turn in ("first", "later"):
            order = np.random.default_rng(0).integers(0, rows, (batches, batch))
            started = time.perf_counter()
            size = 0
            for indices in order:
                size += opened.patch_features("train", indices, dtype=None)[0].nbytes
            result[f"{name}_{turn}_GB_per_s"] = size / (time.perf_counter() - started) / 1e9
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", default="mobilenet", help=f"{', '.join(ENCODERS)}, or a checkpoint folder's shape"
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="threads of the encoder")
    parser.add_argument("--scales", type=int, nargs="+", default=[1])
    parser.add_argument("--frames", type=int, default=None, help="embed clips, so many frames of each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="JSON file for the figures")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    model, processor, plain = make_model(a.encoder, a.scales, a.frames)
    plain_images = a.scales == [1] and a.frames is None
    encoder = Encoder(model, processor, a.device)
    workers = default_workers() if a.workers is None else a.workers
    settings = {"batch_size": a.batch_size, "workers": workers, "near_duplicates": "keep"}
    figures: dict[str, list[np.ndarray]] = {"bare": [], "embed": []} | ({"plain_loop": []} if plain_images else {})
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        (draw_photos if a.frames is None else draw_clips)(photos, a.images)
        files = sorted(photos.glob("*.jpg"))
        frames = a.frames or 1
        one_batch = max(1, a.batch_size // (encoder.pieces * frames))  # images, to warm up
        bare(encoder, one_batch, a.batch_size, frames)
        if plain_images:
            default_allocator = bare(encoder, a.images // 2, a.batch_size)
            script = plain_loop(encoder, plain, files[: a.images // 2], a.batch_size)
        keep_freed_memory()  # as every command does; the other arms have it too
        bare(encoder, one_batch, a.batch_size, frames)
        for turn in range(a.rounds):
            figures["bare"].append(bare(encoder, a.images, a.batch_size, frames))
            cache_folder = Path(folder) / f"cache{turn}"
            figures["embed"].append(embed(encoder, photos, cache_folder, a.images, settings, a.frames))
            if plain_images:
                figures["plain_loop"].append(plain_loop(encoder, plain, files, a.batch_size))
            print({name: values[-1].round(2).tolist() for name, values in figures.items()}, flush=True)
        cache = FeatureCache.open(Path(folder) / "cache0")
        medians = [{name: statistics.median(v[k] for v in values) for name, values in figures.items()} for k in (0, 1)]
        ratios = {}
        for k, suffix in enumerate(("", "_in_processor_seconds")):
            for other in figures.keys() - {"embed"}:
                pairs = zip(figures["embed"], figures[other])
                ratios[f"embed_to_{other}{suffix}"] = statistics.median(e[k] / o[k] for e, o in pairs)
        if plain_images:
            ratios |= {
                "embed_to_plain_loop_with_default_allocator": medians[0]["embed"] / script[0],
                "bare_to_bare_with_default_allocator": medians[0]["bare"] / default_allocator[0],
            }
        result = {
            "encoder": a.encoder,
            "scales": a.scales,
            "frames": a.frames,
            "device": str(encoder.device),
            "threads": torch.get_num_threads(),
            "workers": workers,
            "images_per_s": medians[0],
            "images_per_processor_s": medians[1],
            "ratios": ratios,
            "bytes_per_image": cache.info["bytes"] / cache.counts["cached"],
            "read": read(cache, 30, 32),
        }
    print(json.dumps(result, indent=1))
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
