"""Captions of scenes and questions about them, before and after training.

    scenes -> new -> doctor -> embed -> evaluate -> align -> train -> evaluate -> caption

OUT holds `scenes/` (an image folder), `untrained/`, `cache/`, `aligned/` (stage 1), `run/` (log and curves of the
training), `before/` and `after/` (evaluations), `model/` (the full checkpoint), `summary.json` and `captions.png`.
"""

import json
import textwrap
import time
from pathlib import Path

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.errors import UserError
from blipren.training.quickstart.scenes import Scene, draw_scene, write_scenes
from blipren.training.quickstart.steps import TOWERS, export_model, run_step
from blipren.training.quickstart.text_tokenizer import write_tokenizer
from blipren.training.quickstart.truth import judge_caption

DURATION = "takes less than five minutes on two cores"
SHOWN_SCENES = 12


def run_world(settings: QuickstartSettings, out: Path) -> dict:
    """Run all steps. Returns the figures on held-out scenes before and after training."""
    started = time.perf_counter()
    scenes, untrained, cache, run, model = (out / n for n in ("scenes", "untrained", "cache", "run", "model"))
    count = write_scenes(scenes, settings.seed)
    print(f"drew {count} scenes in {scenes} ({time.perf_counter() - started:.0f} s)")
    run_step("new", out=untrained, vision=TOWERS / "vision", llm=TOWERS / "llm", seed=settings.seed)
    run_step("doctor", model=untrained)
    run_step("embed", model=untrained, dataset=scenes, cache=cache)
    plain = {"probe": False, "report": False, "meteor": False, "resamples": 100}  # only for comparison
    run_step("evaluate", model=untrained, dataset=scenes, out=out / "before", **plain)
    start = untrained
    if settings.align:
        words, start = write_tokenizer(out / "words"), out / "aligned"
        run_step("align", model=untrained, cache=cache, out=start, tokenizer=words, seed=settings.seed)
    run_step("train", model=start, cache=cache, out=run, seed=settings.seed)
    export_model(run, model)
    run_step("evaluate", model=model, dataset=scenes, out=out / "after", before=out / "before", run=run)
    rows = read_rows(scenes)
    shown = pick_shown(rows)
    run_step("caption", model=model, images=[str(scenes / name) for name in shown[:3]])
    draw_grid(out, rows, shown)
    summary = summarise(out)
    print_summary(out, summary)
    return summary


def read_rows(scenes: Path) -> dict[str, dict]:
    """Return the rows of the scenes' metadata by file name."""
    rows = [json.loads(line) for line in (scenes / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["file_name"]: row for row in rows}


def read_captions(evaluation: Path, rows: dict[str, dict]) -> dict[str, str]:
    """Return the captions that `evaluate` wrote, by file name of the image. Raises `UserError` if one is missing."""
    captions: dict[str, str] = {}
    for line in (evaluation / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        prediction = json.loads(line)
        captions.setdefault(prediction["id"], prediction["caption"])  # an image's caption comes before its answers
    missing = [name for name, row in rows.items() if row["split"] == "test" and name not in captions]
    if missing:
        raise UserError(f"{evaluation} lacks captions of {len(missing)} held-out scenes, such as {missing[0]}")
    return captions


def pick_shown(rows: dict[str, dict]) -> list[str]:
    """Return the file names of the scenes for captions.png: half with seen combinations, half with held-out ones."""
    names = {g: [n for n, r in rows.items() if (r["split"], r["group"]) == ("test", g)] for g in ("seen", "unseen")}
    return names["seen"][: SHOWN_SCENES // 2] + names["unseen"][: SHOWN_SCENES // 2]


def summarise(out: Path) -> dict:
    """Return the content of `summary.json`: true captions, CIDEr and question accuracy on held-out scenes, before and after."""
    summary: dict = {}
    for folder, suffix in (("after", ""), ("before", "_before")):
        metrics = json.loads((out / folder / "metrics.json").read_text(encoding="utf-8"))
        truth = metrics["hallucination"]
        values = {
            "captions_true_seen": truth["seen"]["captions_true"],
            "captions_true_unseen": truth["unseen"]["captions_true"],
            "attribute_recall": truth["attribute_recall"],
            "hallucinated_objects": truth["hallucinated_objects"],
            "question_accuracy": metrics["vqa"]["accuracy"],
            "cider": metrics["captioning"]["CIDEr"],
        }
        summary |= {key + suffix: round(value, 4) for key, value in values.items()}
        summary["held_out_scenes"] = metrics["counts"]["images"]
    if (aligned := out / "aligned" / "finished.json").is_file():
        stage_1 = json.loads(aligned.read_text(encoding="utf-8"))
        for key, suffix in (("after", ""), ("before", "_before")):
            recalls = {f"image_to_text_R@{k}{suffix}": stage_1[key][f"i2t_R@{k}"] for k in (1, 5, 10)}
            recalls |= {f"text_to_image_R@{k}{suffix}": stage_1[key][f"t2i_R@{k}"] for k in (1, 5, 10)}
            summary |= {name: round(value, 4) for name, value in recalls.items()}
    return summary


def draw_grid(out: Path, rows: dict[str, dict], shown: list[str]) -> None:
    """Draw `captions.png`: held-out scenes with the caption before and after training, true ones in green."""
    import matplotlib.pyplot as plt

    before, after = (read_captions(out / folder, rows) for folder in ("before", "after"))
    columns = 4
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 5 * lines), squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.97, bottom=0.08, wspace=0.08, hspace=0.32)
    for axis in axes.flat:
        axis.axis("off")
    for axis, name in zip(axes.flat, shown):
        scene = Scene.from_json(rows[name]["scene"])
        axis.imshow(draw_scene(scene, 256))
        axis.set_title(f"{rows[name]['group']} combinations", fontsize=9)
        for height, label, text in ((-0.02, "before", before[name]), (-0.14, "after", after[name])):
            colour = "darkgreen" if judge_caption(text, scene).true else "firebrick"
            words = "\n".join(textwrap.wrap(f"{label}: {text or '(empty)'}", 50)[:3])
            axis.text(0, height, words, color=colour, fontsize=9, va="top", transform=axis.transAxes)
    figure.savefig(out / "captions.png", dpi=90)
    plt.close(figure)


def print_summary(out: Path, summary: dict) -> None:
    """Print the figures before and after training, and where everything is."""
    print(f"\n== {summary['held_out_scenes']} held-out scenes                  before     after")
    for key, label in (
        ("captions_true_seen", "true captions, seen combinations"),
        ("captions_true_unseen", "true captions, unseen combinations"),
        ("attribute_recall", "colours and shapes named"),
        ("hallucinated_objects", "hallucinated objects"),
        ("question_accuracy", "questions answered correctly"),
        ("image_to_text_R@1", "stage 1: image to text R@1"),
        ("text_to_image_R@1", "stage 1: text to image R@1"),
    ):
        if key not in summary:
            continue
        print(f"{label:<38} {summary[key + '_before']:>8.1%}  {summary[key]:>8.1%}")
    print(f"{'CIDEr':<38} {summary['cider_before']:>8.3f}  {summary['cider']:>8.3f}")
    print(
        f"model     {out / 'model'}   (blipren caption {out / 'model'} IMAGE)\n"
        f"pictures  {out / 'captions.png'}, {out / 'after' / 'report.html'}\n"
        f"curves    {out / 'run' / 'curves.png'}"
    )
