"""Cost of a training step with scales and frames against one scale, from cached features and from pixels.

    python benchmarks/scales.py --out scales.json      # SigLIP-B/16, 12-layer Q-Former, 135M Llama shape
    python benchmarks/scales.py --shape tiny           # a few seconds, to try the script
    python benchmarks/scales.py --several 1 8 16 32    # instead: memory of an answer about so many images

A step is forward and backward through Q-Former and projector, with random weights, a frozen encoder and a frozen language model
and one caption an image; without the optimizer, whose work is the same in all arms. Arms share encoder and language model and
take turns; a figure is the median of processor seconds over the rounds. `visual_tokens` is what an image or clip gives the
language model. With `--several` the peak memory of `generate` is that beyond the weights; `bytes_an_image` is what the prompt keeps
of an image: keys and values, image features, patch features.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from parts.measure import PeakMemory
from parts.notebook_rows import padded_with_labels
from parts.train_arms import EOS, PAD, SHAPES
from transformers import LlamaConfig, SiglipVisionConfig

from blipren import BliprenConfig, BliprenForConditionalGeneration, BliprenQFormerConfig
from blipren.training.engine.memory import keep_freed_memory

ARMS = {  # pieces of an image, options of the model, those of the Q-Former beside its shape
    "one scale": (1, {}, {}),
    "scales 1 2, channels": (5, {"vision_scales": [1, 2]}, {}),
    "scales 1 2, sequence": (5, {"vision_scales": [1, 2], "vision_join": "sequence"}, {"num_pieces": 5}),
    "8 frames": (1, {"num_frames": 8}, {"time_embedding": "sinusoidal", "num_frames": 8}),
}


class Arm:
    """A model with its inputs: `pixels` (images only) and `features`, those that a cache stores."""

    def __init__(self, name: str, shape: str, images: int, shared: "Arm | None"):
        vision, qformer, llm, self.queries = SHAPES[shape]
        pieces, options, more = ARMS[name]
        side = vision["image_size"] // vision["patch_size"]
        joined = len(options.get("vision_scales", [1])) if options.get("vision_join") != "sequence" else 1
        width, self.image_token = vision["hidden_size"] * joined, llm["vocab_size"] - 1
        sizes = {"patches_per_piece": side**2, "patches_per_frame": side**2, "encoder_hidden_size": width}
        torch.manual_seed(0)
        self.model = BliprenForConditionalGeneration(
            BliprenConfig(
                vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
                text_config=LlamaConfig(**llm, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS),
                qformer_config=BliprenQFormerConfig(**qformer, **more, **sizes, num_query_tokens=self.queries),
                projector="linear",
                image_token_id=self.image_token,
                vision_grid=[side, side],
                vision_hidden_size=width,
                **options,
            )
        )
        if shared is not None:
            for part in ("vision_tower", "language_model"):
                setattr(self.model.model, part, getattr(shared.model.model, part))
            self.model.tie_weights()
        self.model.train()
        self.model.freeze()
        shape = (images, pieces, 3, vision["image_size"], vision["image_size"])
        if "num_frames" in options:
            frames = torch.randn(images, options["num_frames"], *shape[2:])
            self.pixels, self.features = None, self.model.encode_videos(frames)
        else:
            self.pixels = torch.randn(shape) if pieces > 1 else torch.randn(shape)[:, 0]
            self.features = self.model.encode_images(self.pixels)
        self.visual_tokens = self.model.config.count_visual_tokens(self.features.shape[1])
        prompt = [1] + [self.image_token] * self.visual_tokens + [11, 12, 13]
        rows = [(i, prompt, list(range(20, 32 + i % 4)) + [EOS]) for i in range(images)]
        self.texts = padded_with_labels(rows, max(len(p) + len(a) for _, p, a in rows), PAD)

    def step(self, **inputs) -> float:
        """Return the processor seconds of a step."""
        started = time.process_time()
        self.model(**self.texts, **inputs, use_cache=False).loss.backward()
        self.model.zero_grad(set_to_none=False)
        return time.process_time() - started


def measure_several(arm: Arm, counts: list[int]) -> dict:
    """Return the peak memory in bytes of an answer about each number of images, and what is kept of an image."""
    model, peaks = arm.model.eval(), {}
    for count in [counts[0], *counts]:  # the first one warms up
        ids = torch.tensor([[1] + [arm.image_token] * arm.visual_tokens * count + [11, 12, 13]])
        pixels = torch.randn(count, *arm.pixels.shape[1:])
        with torch.inference_mode(), PeakMemory(torch.device("cpu")) as peak:
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
            )
        peaks[count] = peak.bytes
    layers = found.past_key_values.layers
    cache = sum(part.nbytes for layer in layers for part in (layer.keys, layer.values)) / layers[0].keys.shape[2]
    width, dtype = model.get_input_embeddings().weight.shape[1], arm.features.element_size()
    kept = {
        "keys and values": round(cache * arm.visual_tokens),
        "image features": arm.visual_tokens * width * dtype,
        "patch features": arm.features[0].nbytes,
    }
    return {"peak_bytes": peaks, "bytes_an_image": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="b16-135m")
    parser.add_argument("--images", type=int, default=4, help="images or clips of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--several", type=int, nargs="+", metavar="IMAGES", help="measure memory for these numbers of images"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.several:
        result = measure_several(Arm("one scale", options.shape, 1, None), options.several)
    else:
        result = measure_steps(options)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure_steps(options: argparse.Namespace) -> dict:
    """Return the processor seconds of a step of each arm."""
    keep_freed_memory()
    arms: dict[str, Arm] = {}
    for name in ARMS:
        arms[name] = Arm(name, options.shape, options.images, next(iter(arms.values()), None))
    seconds: dict[str, dict[str, list[float]]] = {name: {"cache": [], "pixels": []} for name in arms}
    for turn in range(options.rounds + 1):  # the first one warms up
        for name, arm in arms.items():
            found = {"cache": arm.step(patch_features=arm.features)}
            if arm.pixels is not None:
                found["pixels"] = arm.step(pixel_values=arm.pixels)
            for kind, value in found.items():
                seconds[name][kind] += [value] if turn else []
            print(name, {kind: round(value, 3) for kind, value in found.items()}, flush=True)
    medians = {n: {k: statistics.median(v) for k, v in kinds.items() if v} for n, kinds in seconds.items()}
    base = medians["one scale"]
    return {
        "shape": options.shape,
        "images": options.images,
        "threads": options.threads,
        "seconds": medians,
        "ratios": {n: {k: v / base[k] for k, v in kinds.items()} for n, kinds in medians.items()},
        "visual_tokens": {name: arm.visual_tokens for name, arm in arms.items()},
    }


if __name__ == "__main__":
    main()
