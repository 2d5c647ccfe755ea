"""Boxes, points and counts of the things in drawn scenes, beside captions and questions.

    scenes with boxes -> new -> embed --grounding -> train -> evaluate --tasks captioning vqa refer -> caption

The language model is frozen and has never seen a picture; `towers/boxes-llm` has read texts about places, and each patch of
`towers/boxes-vision` tells the box of the object on it (see `train_towers.py`). OUT holds `scenes/`, `untrained/`, `cache/`,
`run/`, `model/`, `after/` (evaluation with report), `summary.json`, `boxes.png` (one caption with boxes) and `found.png`
(answers to "Find every ...").
"""

import json
import time
from pathlib import Path

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.quickstart.grounded_scenes import iterate_grounded_rows
from blipren.training.quickstart.scenes import Split, write_scenes
from blipren.training.quickstart.steps import TOWERS, export_model, run_step

DURATION = "takes about ten minutes on two cores"
SPLITS = (
    Split("train", "seen", 3000),
    Split("validation", "seen", 100),
    Split("test", "seen", 100),
    Split("test", "unseen", 100),
)
RECIPE = "quickstart-boxes"
SCORES = ("accuracy", "mean_iou", "several_F1", "absent_refused", "counting", "naming", "pointing", "caption_F1")
SHOWN = 12


def run_world(settings: QuickstartSettings, out: Path) -> dict:
    """Run all steps. Returns the figures on held-out scenes."""
    started = time.perf_counter()
    scenes, untrained, cache, run, model = (out / n for n in ("scenes", "untrained", "cache", "run", "model"))
    count = write_scenes(scenes, settings.seed, SPLITS, iterate_grounded_rows)
    print(f"drew {count} scenes in {scenes} ({time.perf_counter() - started:.0f} s)")
    run_step(
        "new", RECIPE, out=untrained, vision=TOWERS / "boxes-vision", llm=TOWERS / "boxes-llm", seed=settings.seed
    )
    run_step("embed", RECIPE, model=untrained, dataset=scenes, cache=cache)
    run_step("train", RECIPE, model=untrained, cache=cache, out=run, seed=settings.seed)
    export_model(run, model)
    run_step("evaluate", RECIPE, model=model, dataset=scenes, out=out / "after", run=run)
    rows = [
        json.loads(line) for line in (out / "after" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = [row for row in rows if row.get("refer") == "find" and "iou" in row]
    shown = {row["id"]: row for row in found}  # one question an image
    step = max(1, len(shown) // SHOWN)
    draw_found(scenes, list(shown.values())[::step][:SHOWN], out / "found.png")
    first = str(scenes / found[0]["id"])
    run_step(
        "caption",
        model=model,
        images=[first],
        prompt="Caption with boxes:",
        max_new_tokens=128,
        out_image=out / "boxes.png",
    )
    summary = summarise(json.loads((out / "after" / "metrics.json").read_text(encoding="utf-8")))
    print_summary(out, summary)
    return summary


def draw_found(scenes: Path, rows: list[dict], file: Path) -> None:
    """Draw answers to "Find every ..." with their boxes; the true box is dashed."""
    import matplotlib.pyplot as plt
    from PIL import Image

    from blipren.grounding_blipren import read_places
    from blipren.training.evaluation.report.places import draw_places

    lines = -(-len(rows) // 4)
    figure, axes = plt.subplots(lines, 4, figsize=(12, 3.3 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows):
        true = read_places(row["references"][0]).boxes
        axis.imshow(draw_places(Image.open(scenes / row["id"]), row["caption"], row["prompt"], true))
        axis.set_title(f"{row['prompt']} IoU {row['iou']:.2f}", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def summarise(metrics: dict) -> dict:
    """Return the content of `summary.json`: scores of each group of scenes, fixed answers, captions and questions."""
    summary: dict = {}
    for group in ("seen", "unseen"):
        part = metrics["refer"][group]
        summary |= {f"{name}_{group}": round(part[name], 4) for name in SCORES}
        for fixed in ("centre_box", "most_frequent_box"):
            summary[f"accuracy_{fixed}_{group}"] = round(part[fixed]["accuracy"], 4)
        summary[f"captions_true_{group}"] = round(metrics["hallucination"][group]["captions_true"], 4)
    summary["malformed"] = round(metrics["refer"]["malformed"], 4)
    summary["question_accuracy"] = round(metrics["vqa"]["accuracy"], 4)
    summary["cider"] = round(metrics["captioning"]["CIDEr"], 4)
    return summary | {"held_out_scenes": metrics["counts"]["images"]}


def print_summary(out: Path, summary: dict) -> None:
    """Print the figures, and where everything is."""
    print(f"\n== {summary['held_out_scenes']} held-out scenes: combinations      seen    unseen")
    names = dict.fromkeys(key.rpartition("_")[0] for key in summary if key.endswith("_seen"))
    for name in names:
        print(f"{name.replace('_', ' '):<40} {summary[f'{name}_seen']:>7.1%}  {summary[f'{name}_unseen']:>7.1%}")
    print(f"questions answered correctly {summary['question_accuracy']:.1%}, CIDEr {summary['cider']:.3f}")
    print(f"pictures  {out / 'found.png'}, {out / 'boxes.png'}, {out / 'after' / 'report.html'}")
