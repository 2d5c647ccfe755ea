"""One stage 1 under several language models: captioning with and without its Q-Former, on drawn scenes.

    python benchmarks/one_stage_1.py --llm LLM=frozen OTHER=lora --out one_stage_1.json

`align` runs once, under the first language model. For each language model two checkpoints are made, one by
`blipren new --qformer-init ALIGNED` and one of the same shape without it, and both are trained for the same number of
captioning steps, in turn. The figures are CIDEr of held-out scenes and the loss on the validation split.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from blipren.training.cli import build_settings
from blipren.training.commands.align import AlignSettings
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.commands.new import run as new
from blipren.training.evaluation.evaluate import evaluate
from blipren.training.quickstart.scenes import Split, write_scenes
from blipren.training.quickstart.text_tokenizer import write_tokenizer
from blipren.training.stages.align import align
from blipren.training.stages.train import train

TOWERS = Path(__file__).resolve().parents[1] / "training" / "quickstart" / "towers"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", nargs="+", default=[f"{TOWERS / 'llm'}=frozen"], help="LLM=frozen, =lora or =full")
    parser.add_argument("--scenes", type=int, default=3000, help="scenes to train on")
    parser.add_argument("--align-steps", type=int, default=300)
    parser.add_argument(
        "--train-steps", type=int, nargs="+", default=[100, 300], help="captioning budgets, each its run"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default="one_stage_1.json")
    return parser.parse_args()


def seconds_of(call, settings) -> float:
    """Run a command and return its process seconds: on a shared machine wall seconds cannot be compared."""
    begin = time.process_time()
    assert not call(settings)
    return time.process_time() - begin


def make_aligned(work: Path, options: argparse.Namespace, llm: str) -> dict:
    """Draw the scenes, cache their features, and run stage 1 once. Return its seconds and recall."""
    splits = (Split("train", "seen", options.scenes), Split("validation", "seen", 60), Split("test", "seen", 300))
    write_scenes(work / "scenes", 0, splits)
    write_tokenizer(work / "words")
    flags = {"out": str(work / "first"), "vision": str(TOWERS / "vision"), "llm": llm}
    new(build_settings("new", flags, "quickstart"))
    cache = {"model": str(work / "first"), "dataset": str(work / "scenes"), "cache": str(work / "cache")}
    embed(EmbedSettings(**cache, near_duplicates="keep", workers=0))
    settings = AlignSettings(
        model=str(work / "first"), cache=str(work / "cache"), out=str(work / "aligned"), tokenizer=str(work / "words"),
        batch_size=64, max_steps=options.align_steps, learning_rate=2e-3, itm_weight=0.0, itc_label_smoothing=0.0,
        max_text_tokens=48, eval_every=options.align_steps,
    )  # fmt: skip
    seconds = seconds_of(align, settings)
    finished = json.loads((work / "aligned" / "finished.json").read_text())
    return {"seconds": seconds, "recall": finished["after"]["recall"]}


def run_arm(work: Path, llm: str, tuning: str, aligned: bool, steps: int, seed: int) -> dict:
    """Train one language model from one start. Return CIDEr, loss and seconds."""
    folder = work / f"{Path(llm).name}-{tuning}-{'aligned' if aligned else 'plain'}-{steps}-{seed}"
    flags = {"out": str(folder / "new"), "vision": str(TOWERS / "vision"), "llm": llm, "seed": seed}
    if aligned:
        flags["qformer_init"] = str(work / "aligned")
    new(build_settings("new", flags, "quickstart"))
    flags = {"model": str(folder / "new"), "cache": str(work / "cache"), "out": str(folder / "run"), "seed": seed}
    flags |= {"max_steps": steps, "eval_every": steps, "generate_samples": 0, "llm_tuning": tuning}
    seconds = seconds_of(train, build_settings("train", flags, "quickstart"))
    events = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    loss = [event["loss"] for event in events if event["kind"] == "validation"][-1]
    results = {"model": str(folder / "run"), "dataset": str(work / "scenes"), "out": str(folder / "results")}
    evaluate(EvaluateSettings(**results, report=False, probe=False))
    metrics = json.loads((folder / "results" / "metrics.json").read_text())["captioning"]
    result = {"aligned": aligned, "steps": steps, "seed": seed, "validation_loss": loss, "CIDEr": metrics["CIDEr"]}
    result["train_seconds"] = seconds
    print(f"{Path(llm).name} ({tuning}): {json.dumps(result)}", flush=True)
    return result


def main() -> None:
    options = arguments()
    llms = [spec.rpartition("=")[::2] for spec in options.llm]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        stage_1 = make_aligned(work, options, llms[0][0])
        arms = {
            f"{Path(llm).name} ({tuning})": [
                run_arm(work, llm, tuning, aligned, steps, seed)
                for seed in options.seeds
                for steps in options.train_steps
                for aligned in (True, False)
            ]
            for llm, tuning in llms
        }
    report = {
        "settings": vars(options),
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "stage_1": stage_1,
        "arms": arms,
    }
    Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
    for name, results in arms.items():
        for steps in options.train_steps:
            for aligned in (True, False):
                values = [r["CIDEr"] for r in results if r["steps"] == steps and r["aligned"] == aligned]
                start = "aligned" if aligned else "without"
                print(f"{name}, {steps} steps, {start}: CIDEr {sum(values) / len(values):.3f} {values}")


if __name__ == "__main__":
    main()
