"""Speed and memory of `blipren train` against the notebook way and against transformers' BLIP-2, side by side.

    python benchmarks/train.py --out train.json                  # SigLIP-B/16, 12-layer Q-Former, 135M Llama shape
    python benchmarks/train.py --shape tiny --rounds 2           # seconds: shows that it runs
    python benchmarks/train.py --shape so400m-1b --device cuda   # on a GPU

Every arm trains the same bridge with the same random weights on the same drawn photos and the same captions, without
dropout, optimizer step included; the losses of all arms are compared before anything is timed. Arms take turns, and a
figure is the median over the rounds. Ratios are the result: absolute figures depend on the machine and its load.
"""

import argparse
import ctypes
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from notebook_rows import padded_with_labels
from PIL import Image
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blipren import BliprenConfig, BliprenForConditionalGeneration, BliprenQFormerConfig
from blipren.modeling_blipren import copy_weights
from blipren.qformer_weights_blipren import copy_blip2_weights
from blipren.training.data.batches.blocks import PromptEncoder, build_blocks
from blipren.training.data.batches.collate import collate_padded, collate_shared, useful_share
from blipren.training.data.batches.masks import FLEX, build_attention_mask, shared_prefix_block_mask
from blipren.training.engine import flops
from blipren.training.engine.memory import keep_freed_memory
from blipren.training.objectives.likelihood import answer_losses

LLAMA_135M = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                  num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)  # fmt: skip
LLAMA_1B = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True)  # fmt: skip
VIT_B = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
             patch_size=16)  # fmt: skip
VIT_SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                  image_size=384, patch_size=14)  # fmt: skip
QFORMER = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
               cross_attention_frequency=2)  # fmt: skip
SMALL = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
SHAPES = {
    "b16-135m": (VIT_B, QFORMER, LLAMA_135M, 32),
    "so400m-1b": (VIT_SO400M, QFORMER, LLAMA_1B, 32),
    "tiny": (
        SMALL | dict(image_size=32, patch_size=8),
        SMALL | dict(cross_attention_frequency=2),
        SMALL | dict(num_key_value_heads=2, vocab_size=500, tie_word_embeddings=True),
        4,
    ),
}
EOS, PAD, CAPTION_LENGTH = 2, 0, 64


class Words:
    """Stands for a processor: a plain prompt of four tokens behind the image."""

    prompts, system_prompts = ["Short caption:"], []

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def encode_prompt(self, prompt=None, system=None, num_visual_tokens=()):
        return [1] + [self.image_token_id] * num_visual_tokens[0] + [11, 12, 13]


class CachedFeatures(nn.Module):
    """Stands for BLIP-2's vision encoder: gives what was computed before."""

    main_input_name = "pixel_values"
    features: torch.Tensor

    def forward(self, pixel_values=None, **keywords):
        return BaseModelOutputWithPooling(last_hidden_state=self.features)


class Bench:
    """The two models with equal weights, the data, and an arm for each way to train on it."""

    def __init__(self, options, folder: Path):
        vision, qformer, llm, self.queries = SHAPES[options.shape]
        self.options, self.device = options, torch.device(options.device)
        torch.manual_seed(0)
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        text_config = LlamaConfig(
            **llm, max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS
        )
        image_token = llm["vocab_size"] - 1  # BLIP-2 embeds its placeholder, so it must be of the vocabulary
        self.blip2 = Blip2ForConditionalGeneration(
            Blip2Config(
                vision_config=Blip2VisionConfig(**vision),
                qformer_config=Blip2QFormerConfig(**qformer, **no_dropout, encoder_hidden_size=vision["hidden_size"], vocab_size=8),
                text_config=text_config,
                num_query_tokens=self.queries,
                image_token_index=image_token,
            )
        )  # fmt: skip
        self.ours = BliprenForConditionalGeneration(
            BliprenConfig(
                vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
                text_config=text_config,
                qformer_config=BliprenQFormerConfig(
                    **qformer, **no_dropout, encoder_hidden_size=vision["hidden_size"], num_query_tokens=self.queries
                ),
                projector="linear",
                image_token_id=image_token,
            )
        )
        copy_weights(self.ours.model.language_model, self.blip2.language_model.model)
        self.ours.tie_weights()
        weights = {k: v for k, v in self.blip2.state_dict().items() if k.startswith(("qformer.", "query_tokens"))}
        copy_blip2_weights(self.ours.model.qformer, weights)
        self.ours.model.projector.load_state_dict(self.blip2.language_projection.state_dict())
        self.vision_model, self.cached = self.blip2.vision_model, CachedFeatures()
        for model in (self.ours, self.blip2):
            model.to(self.device).train()
        self.ours.freeze()
        self.blip2.requires_grad_(False)
        self.blip2.vision_model.eval()
        self.blip2.language_model.eval()
        trained = [
            self.blip2.query_tokens,
            *self.blip2.qformer.parameters(),
            *self.blip2.language_projection.parameters(),
        ]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.optimizers = {
            "ours": torch.optim.AdamW([p for p in self.ours.parameters() if p.requires_grad], lr=0.0),
            "blip2": torch.optim.AdamW(trained, lr=0.0),  # a rate of zero keeps all arms' losses comparable
        }
        self.image_processor = SiglipImageProcessorPil(
            size={"height": vision["image_size"], "width": vision["image_size"]}
        )
        self.photos = self.draw(folder, options.images)
        random = np.random.default_rng(1)
        # lengths as of Flickr8k's captions under a small BPE: 6 to 24 tokens, 13 in the mean
        self.captions = [
            [
                [*random.integers(20, llm["vocab_size"] - 2, int(np.clip(random.gamma(9, 1.45), 6, 24))).tolist(), EOS]
                for _ in range(options.captions)
            ]
            for _ in range(options.images)
        ]
        prompts = PromptEncoder(Words(image_token))
        self.blocks = [
            block
            for i, answers in enumerate(self.captions)
            for block in build_blocks((0, i), [(None, a) for a in answers], self.queries, prompts)
        ]
        self.pairs = options.images * options.captions
        self.num_targets = sum(len(a) for answers in self.captions for a in answers)
        with torch.no_grad():
            self.features = self.ours.encode_images(self.pixels(range(options.images)))

    def draw(self, folder: Path, count: int) -> list[Path]:
        random, paths = np.random.default_rng(0), []
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480), 3)
            paths.append(folder / f"{number}.jpg")
            coarse.save(paths[-1], quality=90)
        return paths

    def pixels(self, images) -> torch.Tensor:
        pictures = [Image.open(self.photos[i]).convert("RGB") for i in images]
        return self.image_processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)

    # ---- rows for the arms that know nothing of packing -----------------------------------------------------------

    def rows(self, text_length: int | None) -> tuple[list[int], dict[str, torch.Tensor]]:
        """A right-padded row a pair; captions padded to `text_length`, or to the longest row."""
        rows = [(b.image[1], b.prefix + prompt, answer) for b in self.blocks for prompt, answer in b.segments]
        head = len(rows[0][1])
        length = head + text_length if text_length else max(len(p) + len(a) for _, p, a in rows)
        tensors = padded_with_labels(rows, length, PAD)
        return [image for image, _, _ in rows], {k: v.to(self.device) for k, v in tensors.items()}

    # ---- arms: each gives its loss and the share of positions that are tokens -------------------------------------

    def notebook(self):
        """(a) Decode, encode, Q-Former for every pair; captions padded to 64; all logits."""
        images, batch = self.rows(CAPTION_LENGTH)
        share = batch["attention_mask"].float().mean().item()
        return self.ours(**batch, pixel_values=self.pixels(images), use_cache=False).loss, share

    def blip2_pixels(self):
        """(b) BLIP-2 as it is, padded to the longest row. Its encoder is its own: the loss differs."""
        images, batch = self.rows(None)
        self.blip2.vision_model = self.vision_model
        share = batch["attention_mask"].float().mean().item()
        return self.blip2(**batch, pixel_values=self.pixels(images), use_cache=False).loss, share

    def blip2_features(self):
        """(b) BLIP-2 on cached features."""
        images, batch = self.rows(None)
        self.cached.features = self.features[images]
        self.blip2.vision_model = self.cached
        share = batch["attention_mask"].float().mean().item()
        pixels = torch.empty(len(images), 3, 1, 1, device=self.device)
        return self.blip2(**batch, pixel_values=pixels, use_cache=False).loss, share

    def ours_on(self, batch: dict, fused: bool = False):
        images = [image for _, image in batch.pop("images")]
        share = useful_share(batch)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        batch["inputs"] = {"patch_features": self.features[images]}
        inputs, mask = batch["inputs"], build_attention_mask(batch, self.ours.parts()["llm"])
        outputs = self.ours(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask,
            logits_at=batch["predict_from"], targets=batch["targets"] if fused else None, use_cache=False, **inputs,
        )  # fmt: skip
        if fused:
            return outputs.loss / self.num_targets, share
        return answer_losses(outputs.logits, batch["targets"], 0.0)[1] / self.num_targets, share

    def padded(self):
        """(c) Cached features, rows padded dynamically, logits at labels only."""
        return self.ours_on(collate_padded(self.blocks, PAD))

    def shared(self):
        """(d) Cached features, one prefix an image, packed rows, logits at labels only."""
        return self.ours_on(collate_shared(self.blocks, PAD))

    def fused(self):
        """(d) with logits of few positions at a time."""
        return self.ours_on(collate_shared(self.blocks, PAD), fused=True)

    def long_rows(self):
        """(d) in rows of 2,048 tokens, which FlexAttention does not pay for."""
        return self.ours_on(collate_shared(self.blocks, PAD, 2048))

    # ---- measuring ------------------------------------------------------------------------------------------------

    def step(self, arm: str) -> tuple[float, float]:
        optimizer = self.optimizers["blip2" if arm.startswith("blip2") else "ours"]
        loss, share = getattr(self, arm)()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.item(), share


def resident(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


class PeakMemory:
    """Most memory that a block takes beyond what was taken before it: `.bytes`, None where it cannot be measured."""

    bytes: int | None = None

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        elif platform.system() == "Linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")
        return self

    def __exit__(self, *error):
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif platform.system() == "Linux":
            self.bytes = resident("VmHWM") - self.before


def profile_of(bench: Bench) -> dict[str, float]:
    """Share of a step of (d) that each operator takes itself; those below a hundredth together as `other`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        bench.step("shared")
    own = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, own) for event in profiler.key_averages()}
    total = sum(times.values())
    shares = {key: spent / total for key, spent in sorted(times.items(), key=lambda item: -item[1])}
    large = {key: round(share, 3) for key, share in shares.items() if share >= 0.01}
    return large | {"other": round(1 - sum(large.values()), 3)}


def attention_pieces(bench: Bench) -> dict[str, float]:
    """Positions that FlexAttention computes, in its pieces of 128 x 128, of those that a dense mask does in rows of least
    cost; by length of row."""
    batches = {length: collate_shared(bench.blocks, PAD, length) for length in (None, 2048)}
    dense = batches[None]["input_ids"].numel() * batches[None]["input_ids"].shape[1]
    shares = {}
    for length, batch in batches.items():
        mask = shared_prefix_block_mask(batch["block_ids"], batch["segment_ids"])
        pieces = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
        shares[str(length or "least cost")] = pieces.item() * 128**2 / dense
    return shares


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product: what this machine can do at most, right now."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began))
    return best


ARMS = ["notebook", "blip2_pixels", "blip2_features", "padded", "shared"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="b16-135m")
    parser.add_argument("--images", type=int, default=8, help="images of a step")
    parser.add_argument("--captions", type=int, default=5, help="captions of an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=["cpu", "wall"],
        default="wall",
        help="cpu: this process's time, for a machine that is shared",
    )
    parser.add_argument("--half", action="store_true", help="add arms in bf16, with SDPA and eager attention")
    parser.add_argument("--compile", action="store_true", help="add a compiled arm")
    parser.add_argument("--fused", action="store_true", help="add an arm with `fused_loss`")
    parser.add_argument("--flex", action="store_true", help="with --half, on a GPU: an arm with FlexAttention")
    parser.add_argument("--profile", action="store_true", help="say where the time of (d) goes, by operator")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as every command does; all arms have it
    with tempfile.TemporaryDirectory() as folder:
        report = run(options, Path(folder))
    text = json.dumps(report, indent=1)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


def timed(bench: Bench, arms: dict[str, str], results: dict[str, dict], rounds: int) -> None:
    """Arms (name -> method) take turns, so that a load on the machine falls on all of them."""
    for _ in range(rounds):
        for name, arm in arms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            bench.step(arm)  # ends with .item(), which waits for the device
            results[name].setdefault("wall_seconds", []).append(time.perf_counter() - wall)
            results[name].setdefault("cpu_seconds", []).append(time.process_time() - cpu)
            print(name, {k: results[name][k][-1] for k in ("wall_seconds", "cpu_seconds")}, flush=True)
    # apart, since measuring gives memory back that the next step would have to map anew
    for name, arm in arms.items():
        with PeakMemory(bench.device) as memory:
            bench.step(arm)
        results[name]["peak_memory_bytes"] = memory.bytes
        print(name, {"peak_memory_bytes": memory.bytes}, flush=True)


def run(options, folder: Path) -> dict:
    bench = Bench(options, folder)
    results: dict[str, dict] = {}
    for arm in options.arms:  # warms up, counts, and proves that all compute the same
        found: list = []
        count = flops.count(lambda arm=arm, found=found: found.append(bench.step(arm)))
        results[arm] = {"loss": found[0][0], "useful_tokens": found[0][1], "flops": count}
        print(arm, results[arm], flush=True)
    equal = [results[arm]["loss"] for arm in options.arms if arm != "blip2_pixels"]
    if max(equal) - min(equal) > 1e-4 * max(equal):
        raise SystemExit(f"the arms do not compute the same: {equal}")
    rate = {"fp32": matmul_rate(bench.device, torch.float32)}
    timed(bench, {arm: arm for arm in options.arms}, results, options.rounds)
    if options.fused:
        results["shared_fused"] = {"loss": bench.step("fused")[0]}
        timed(bench, {"shared": "shared", "shared_fused": "fused"}, results, options.rounds)
    profile = profile_of(bench) if options.profile else None
    if options.compile:
        forward = bench.ours.forward
        bench.ours.forward = torch.compile(forward, dynamic=True)
        results["shared_compiled"] = {"loss": bench.step("shared")[0]}
        timed(bench, {"shared_compiled": "shared"}, results, options.rounds)
        bench.ours.forward = forward
    if options.half:
        rate["bf16"] = matmul_rate(bench.device, torch.bfloat16)
        for part in ("vision", "llm", "head"):
            for parameter in bench.ours.parts()[part].parameters():
                parameter.data = parameter.data.bfloat16()
        with torch.autocast(bench.device.type, torch.bfloat16):
            arms = {"sdpa": "shared", "eager": "shared"} | ({FLEX: "long_rows"} if options.flex else {})
            for attention, arm in arms.items():
                bench.ours.model.language_model.set_attn_implementation(attention)
                name = f"shared_bf16_{attention}"
                results[name] = {"loss": bench.step(arm)[0], "dtype": "bf16"}
                if "shared" in results:
                    results[name]["flops"] = results["shared"]["flops"]
                timed(bench, {name: arm}, results, options.rounds)
    clock = "wall_seconds" if options.device != "cpu" or options.clock == "wall" else "cpu_seconds"
    for result in results.values():
        seconds = result["seconds"] = statistics.median(result[clock])
        result["pairs_per_second"] = bench.pairs / seconds
        result["answer_tokens_per_second"] = bench.num_targets / seconds
        if "flops" in result:
            half = result.get("dtype") == "bf16"
            result["share_of_matmul_rate"] = result["flops"] / seconds / rate["bf16" if half else "fp32"]
            if peak := flops.peak(bench.device, half):
                result["model_flop_utilisation"] = result["flops"] / seconds / peak
    ratios = {}
    for other in options.arms:
        if other != "shared" and "shared" in results:
            mine, theirs = results["shared"], results[other]
            ratios[f"shared over {other}"] = {
                "pairs_per_second": theirs["seconds"] / mine["seconds"],
                "allowed_by_arithmetic": theirs["flops"] / mine["flops"],
            }
            if theirs["peak_memory_bytes"]:
                ratios[f"shared over {other}"]["peak_memory"] = mine["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(), "threads": options.threads,
            "device": options.device, "clock": clock, "matmul_flops_per_second": rate, "torch": torch.__version__,
        },
        "shape": options.shape, "images": options.images, "captions_per_image": options.captions,
        "pairs": bench.pairs, "answer_tokens": bench.num_targets, "arms": results, "ratios": ratios, "profile": profile,
        "attention_pieces": attention_pieces(bench),
    }  # fmt: skip


if __name__ == "__main__":
    main()
