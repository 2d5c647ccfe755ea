"""What the report shows of the run that trained the model: curves, and values before and after."""

import json
import re
from pathlib import Path

PREFERENCES = {
    "chosen_likelier": "pairs whose chosen answer the model finds likelier",
    "rewards/accuracies": "pairs whose chosen answer gained more on the model before training",
    "rewards/margins": "reward of the chosen answer above that of the rejected one",
    "reward": "mean reward of greedy answers",
}


def training_curves(folder: str | None) -> tuple[list[dict], int | None]:
    """Return the panels of a run folder's curves.json and the step whose model was kept, or ([], None) without a run."""
    if folder is None or not (Path(folder) / "curves.json").is_file():
        return [], None
    curves = json.loads((Path(folder) / "curves.json").read_text(encoding="utf-8"))
    panels: dict[str, list[dict]] = {}
    for name, points in curves.items():
        kind, _, quantity = name.partition(" ")
        if quantity in ("loss", "learning_rate", "grad_norm", "CIDEr") or quantity.startswith(("R@", "recall")):
            title = "recall" if quantity.startswith("R@") else quantity.replace("_", " ")
            step = max(1, len(points) // 400)
            finite = [p for p in points[::step] if p[1] is not None and p[1] == p[1] and abs(p[1]) != float("inf")]
            if finite:
                panels.setdefault(title, []).append({"name": name, "points": finite})
    chosen, values = None, finished_run(folder)
    if values:
        kept = re.search(r"\d+", str(values.get("kept", "")))
        chosen = int(kept.group()) if kept else values["steps"] if values.get("kept") == "last" else None
    return [{"title": title, "lines": lines} for title, lines in panels.items()], chosen


def finished_run(folder: str | None) -> dict:
    """Return the summary of a finished run, or {} without one."""
    file = Path(folder or "") / "finished.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def text_loss_line(folder: str | None) -> str | None:
    """Return what tuning cost the language model: its loss on text without images before and after the run, or None."""
    found = finished_run(folder).get("text_loss")
    return found and f"{found['before']:.4f} before training, {found['after']:.4f} after (nats a token)"


def preference_lines(folder: str | None) -> dict[str, str]:
    """Return preference accuracy and reward on the validation split before and after a run of `dpo` or `grpo`."""
    found = finished_run(folder).get("validation", {})
    return {
        label: f"{found[name]['before']:.4f} before training, {found[name]['after']:.4f} after"
        for name, label in PREFERENCES.items()
        if name in found
    }
