"""Captioning with and without stage 1 in equal total time, as in Figure 5 of BLIP-2.

    python benchmarks/align.py DATASET --vision ENCODER --llm LLM --tokenizer WORDPIECE --out ablation.json
    python benchmarks/align.py scenes --out ablation.json       # draws scenes and takes the quickstart's towers

Three arms share one feature cache: the Q-Former with stage 1 before captioning, the Q-Former without stage 1, and the
projector alone on every patch. The other arms get the time of stage 1 as additional captioning steps, so that all arms train
for the same time. The figure is CIDEr on the held-out split. `--seeds` repeats everything.
"""

import argparse
import json
import shutil
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

ARMS = {"stage 1": "qformer", "no stage 1": "qformer", "patches": "patches"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="what `blipren embed` takes, or `scenes`")
    parser.add_argument("--vision")
    parser.add_argument("--llm")
    parser.add_argument("--tokenizer", help="WordPiece tokenizer of the text side")
    parser.add_argument("--recipe", default="quickstart", help="recipe of new and train")
    parser.add_argument("--scenes", type=int, default=3000, help="scenes to train on")
    parser.add_argument("--align-steps", type=int, default=300)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of a step of stage 1")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of stage 1")
    parser.add_argument("--weights", type=float, nargs=3, default=(1.0, 0.0, 1.0), help="of ITC, ITM and ITG")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", help="folder that keeps everything; a temporary one by default")
    parser.add_argument("--out", default="align.json")
    return parser.parse_args()


PROBE = 100  # steps of the run that measures the cost of a step


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Draw the scenes if they are the data set, and set their towers."""
    if options.dataset != "scenes":
        return
    towers = Path(__file__).resolve().parents[1] / "training" / "quickstart" / "towers"
    options.dataset, options.tokenizer = str(work / "scenes"), str(work / "words")
    options.vision, options.llm = options.vision or str(towers / "vision"), options.llm or str(towers / "llm")
    write_tokenizer(work / "words")
    splits = (Split("train", "seen", options.scenes), Split("validation", "seen", 60), Split("test", "seen", 300))
    write_scenes(work / "scenes", 0, splits)


def seconds_of(call, *settings) -> tuple[float, float]:
    """Return process seconds and wall seconds. On a shared machine only process seconds can be compared."""
    wall, process = time.perf_counter(), time.process_time()
    call(*settings)
    return time.process_time() - process, time.perf_counter() - wall


def run_arm(options, work: Path, arm: str, seed: int, budget: dict) -> dict:
    """Run one arm from `new` to CIDEr.

    The first arm sets `budget`, the seconds of both stages. The others get as many steps as fit into it, by the cost of a
    step in a short run of their own.
    """
    folder = work / f"{arm.replace(' ', '-')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    made, run = str(folder / "new"), str(folder / "run")
    values = {"out": made, "vision": options.vision, "llm": options.llm, "connector": ARMS[arm], "seed": seed}
    new(build_settings("new", values, options.recipe))
    cache = work / "cache"
    if not (cache / "cache.json").exists():
        embed(EmbedSettings(model=made, dataset=options.dataset, cache=str(cache), near_duplicates="keep", workers=0))
    result: dict = {"seed": seed}
    model, steps = made, options.train_steps
    if arm == "stage 1":
        settings = AlignSettings(
            model=made, cache=str(cache), out=str(folder / "aligned"), tokenizer=options.tokenizer, seed=seed,
            batch_size=options.batch_size, max_steps=options.align_steps, learning_rate=options.learning_rate,
            itc_weight=options.weights[0], itm_weight=options.weights[1], itg_weight=options.weights[2],
            itc_label_smoothing=0.0, max_text_tokens=48, eval_every=options.align_steps,
        )  # fmt: skip
        result["stage_1_seconds"], result["stage_1_wall_seconds"] = seconds_of(align, settings)
        result["recall"] = json.loads((folder / "aligned" / "finished.json").read_text())["after"]["recall"]
        model = settings.out

    def captioning(out: str, steps: int) -> tuple[float, float]:
        values = {"model": model, "cache": str(cache), "out": out, "max_steps": steps, "eval_every": steps}
        return seconds_of(
            train, build_settings("train", values | {"seed": seed, "generate_samples": 0}, options.recipe)
        )

    if arm != "stage 1":
        steps = round(budget["seconds"] / (captioning(str(folder / "probe"), PROBE)[0] / PROBE))
    result["train_seconds"], result["train_wall_seconds"] = captioning(run, steps)
    budget.setdefault("seconds", result.get("stage_1_seconds", 0.0) + result["train_seconds"])
    result["train_steps"] = steps
    evaluate(
        EvaluateSettings(model=run, dataset=options.dataset, out=str(folder / "results"), report=False, probe=False)
    )
    metrics = json.loads((folder / "results" / "metrics.json").read_text())["captioning"]
    result |= {name: metrics[name] for name in ("CIDEr", "BLEU-4", "ROUGE-L")}
    print(f"{arm}, seed {seed}: {json.dumps(result)}", flush=True)
    return result


def main() -> None:
    options = arguments()
    if options.arms[0] != "stage 1":
        raise SystemExit("the first arm must be 'stage 1': its time is what the others get")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(options.work or scratch)
        work.mkdir(parents=True, exist_ok=True)
        prepare(options, work)
        arms: dict[str, list[dict]] = {arm: [] for arm in options.arms}
        for seed in options.seeds:
            budget: dict[str, float] = {}
            for arm in options.arms:
                arms[arm].append(run_arm(options, work, arm, seed, budget))
    mean = {arm: sum(r["CIDEr"] for r in results) / len(results) for arm, results in arms.items()}
    report = {
        "settings": vars(options),
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "arms": arms,
        "mean_CIDEr": mean,
        "ratios": {f"stage 1 / {arm}": mean["stage 1"] / value for arm, value in mean.items() if arm != "stage 1"},
    }
    Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["mean_CIDEr"]), f"\n{options.out}")


if __name__ == "__main__":
    main()
