"""Speed and memory of a step of `blipren train`, of a notebook's loop and of transformers' BLIP-2.

    python benchmarks/train.py --out train.json                  # SigLIP-B/16, 12-layer Q-Former, 135M Llama shape
    python benchmarks/train.py --shape tiny --rounds 2           # a few seconds, to try the script
    python benchmarks/train.py --shape so400m-1b --device cuda   # on a GPU

Every arm trains the same bridge with the same random weights on the same drawn photos and captions, without dropout; a step
includes the optimizer. The losses of all arms are compared before anything is timed. Arms take turns, and a figure is the
median over the rounds. The ratios are the result: absolute figures depend on the machine and its load.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from parts.measure import PeakMemory, matmul_rate, operator_shares
from parts.train_arms import SHAPES, Bench, attention_pieces

from blipren.training.data.batches.masks import FLEX
from blipren.training.engine import flops
from blipren.training.engine.memory import keep_freed_memory
from blipren.training.engine.trained_parts import compile_layers

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
        help="cpu: processor time, for a shared machine",
    )
    parser.add_argument("--half", action="store_true", help="add arms in bf16, with SDPA and eager attention")
    parser.add_argument("--compile", action="store_true", help="add an arm with compiled layers (in bf16 with --half)")
    parser.add_argument("--fused", action="store_true", help="add an arm with `fused_loss`")
    parser.add_argument("--flex", action="store_true", help="with --half, on a GPU: an arm with FlexAttention")
    parser.add_argument("--profile", action="store_true", help="time of (d) by operator")
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
    """Time arms (name -> method of `Bench`) in turns, so that other load on the machine affects all of them."""
    for _ in range(rounds):
        for name, arm in arms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            bench.step(arm)  # ends with .item(), which waits for the device
            results[name].setdefault("wall_seconds", []).append(time.perf_counter() - wall)
            results[name].setdefault("cpu_seconds", []).append(time.process_time() - cpu)
            print(name, {k: results[name][k][-1] for k in ("wall_seconds", "cpu_seconds")}, flush=True)
    # measured separately: it returns memory to the kernel, which would slow the next step
    for name, arm in arms.items():
        with PeakMemory(bench.device) as memory:
            bench.step(arm)
        results[name]["peak_memory_bytes"] = memory.bytes
        print(name, {"peak_memory_bytes": memory.bytes}, flush=True)


def time_compiled(bench: Bench, name: str, results: dict[str, dict], rounds: int) -> None:
    """Compile the layers of our model, which stay compiled, and time the steps behind the first, which compiles."""
    compile_layers(bench.ours, "inductor")
    began = time.perf_counter()
    loss, _ = bench.step("shared")
    results[name] = {"loss": loss, "first_step_seconds": time.perf_counter() - began}
    print(name, results[name], flush=True)
    if "shared" in results:
        results[name]["flops"] = results["shared"]["flops"]
    timed(bench, {name: "shared"}, results, rounds)


def run(options, folder: Path) -> dict:
    bench = Bench(options, folder)
    results: dict[str, dict] = {}
    for arm in options.arms:  # warm up, count, and check that all arms compute the same
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
    profile = operator_shares(lambda: bench.step("shared"), bench.device) if options.profile else None
    if options.compile and not options.half:
        time_compiled(bench, "shared_compiled", results, options.rounds)
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
            if options.compile:
                bench.ours.model.language_model.set_attn_implementation("sdpa")
                time_compiled(bench, "shared_bf16_compiled", results, options.rounds)
                results["shared_bf16_compiled"]["dtype"] = "bf16"
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
