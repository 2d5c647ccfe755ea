"""Every precision and attention of `blipren train` on a GPU, trained on drawn scenes.

    python benchmarks/gpu_paths.py --out gpu_paths.json

Every run has the same cache, initial weights and order of batches. Dropout draws other numbers in half precision, so losses
of single runs differ by chance: compare them over several seeds. The speed is the median of the second half of the log.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TOWERS = Path(__file__).resolve().parent.parent / "training" / "quickstart" / "towers"
PATHS = {
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16"],
    "fp16": ["--precision", "fp16"],
    "bf16 eager attention": ["--precision", "bf16", "--attention", "eager"],
    "bf16 FlexAttention": ["--precision", "bf16", "--attention", "flex_attention"],
    "bf16 compiled": ["--precision", "bf16", "--compile"],
    "bf16 recomputed activations": ["--precision", "bf16", "--gradient-checkpointing"],
    "bf16 padded rows": ["--precision", "bf16", "--no-shared-prefix"],
    "bf16 averaged weights": ["--precision", "bf16", "--ema", "0.9"],
    "bf16 LoRA": ["--precision", "bf16", "--llm-tuning", "lora"],
    "bf16 full": ["--precision", "bf16", "--llm-tuning", "full", "--learning-rates", "{llm: 2.0e-5}"],
}


def blipren(*arguments: object) -> None:
    """Run a command in a process of its own. Raises `CalledProcessError` if it fails."""
    subprocess.run([sys.executable, "-m", "blipren.training.cli", *map(str, arguments)], check=True, timeout=320)


def measure(run: Path) -> dict:
    """Return losses and speeds of a finished run, from its log."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "train"]
    late = steps[len(steps) // 2 :]
    return {
        "losses": [event["loss"] for event in steps],
        "validation_loss": [event["loss"] for event in events if event["kind"] == "validation"][-1],
        "tokens_per_second": statistics.median(event["tokens_per_second"] for event in late),
        "mfu": statistics.median(event["mfu"] for event in late) if "mfu" in late[0] else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="seed of the training runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--out", type=Path, default=Path("gpu_paths.json"))
    options = parser.parse_args()
    from blipren.training.quickstart.scenes import Split, write_scenes

    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        splits = (Split("train", "seen", options.scenes), Split("validation", "seen", 200))
        write_scenes(work / "scenes", 0, splits)
        blipren(
            "new", work / "model", "--config", "quickstart", "--vision", TOWERS / "vision", "--llm", TOWERS / "llm"
        )
        blipren("doctor", work / "model")
        blipren("embed", work / "model", work / "scenes", work / "cache", "--device", options.device)
        for name in options.paths:
            run = work / name.replace(" ", "-")
            try:
                blipren(
                    "train", work / "model", work / "cache", run, "--config", "quickstart",
                    "--max-steps", options.steps, "--eval-every", options.steps, "--batch-size", options.batch_size,
                    "--log-every", max(1, options.steps // 20), "--device", options.device, "--generate-samples", 1, "--seed", options.seed,
                    *PATHS[name],
                )  # fmt: skip
                results[name] = measure(run)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                results[name] = {"failed": str(error).splitlines()[0][-80:]}  # the other paths still count
            print(name, {k: v for k, v in results[name].items() if k != "losses"}, flush=True)
    base = results.get("fp32", {}).get("losses")
    for name, result in results.items():
        if base and "losses" in result and name not in ("bf16 LoRA", "bf16 full"):
            result["largest_loss_difference"] = max(abs(a - b) for a, b in zip(base, result["losses"], strict=True))
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    report = {"machine": machine, "torch": torch.__version__, "steps": options.steps, "paths": results}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({n: {k: v for k, v in r.items() if k != "losses"} for n, r in results.items()}, indent=1))


if __name__ == "__main__":
    main()
