"""Conversations about scenes: several turns about one picture, and questions about two pictures at once.

    conversations -> new -> embed -> train -> evaluate

The bridge learns captions, turns and questions about two pictures together, and the language model with it, at a lower rate.
`towers/conversations-llm` has read texts of several turns and about two scenes (see `train_towers.py`), but has never seen a
picture. OUT holds `scenes/` (with conversations.jsonl), `untrained/`, `cache/`, `run/` (the training), `model/`, `after/`
(evaluation) and `summary.json`.
"""

import json
import time
from pathlib import Path

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.quickstart.conversation_scenes import PAIR_QUESTIONS, best_guess_share, write_conversations
from blipren.training.quickstart.steps import TOWERS, export_model, run_step

DURATION = "takes at most 20 minutes on two cores"
RECIPE = "quickstart-conversations"


def run_world(settings: QuickstartSettings, out: Path) -> dict:
    """Run all steps. Returns the accuracy on held-out scenes by kind of question, with what guessing reaches."""
    started = time.perf_counter()
    untrained, cache, run, model = (out / name for name in ("untrained", "cache", "run", "model"))
    data = write_conversations(out / "scenes", settings.seed)
    print(f"drew scenes and wrote conversations in {data} ({time.perf_counter() - started:.0f} s)")
    towers = {"vision": TOWERS / "vision", "llm": TOWERS / "conversations-llm"}
    run_step("new", out=untrained, seed=settings.seed, **towers)
    run_step("embed", recipe=RECIPE, model=untrained, dataset=data, cache=cache)
    run_step("train", recipe=RECIPE, model=untrained, cache=cache, out=run, seed=settings.seed)
    export_model(run, model)
    run_step("evaluate", recipe=RECIPE, model=model, dataset=data, out=out / "after", run=run)
    summary = summarise(data, out / "after")
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):<44} {value:>8.1%}")
    return summary


def summarise(data: Path, evaluation: Path) -> dict:
    """Return accuracies on the test split: of turns about one scene by group, and of questions about two by kind.

    `chance` is what the likeliest answer reaches for each question about two scenes, and for the first three words of each
    question about one, without a picture.
    """
    rows = {row["id"]: row for row in map(json.loads, data.read_text(encoding="utf-8").splitlines())}
    lines = [json.loads(line) for line in (evaluation / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    answered = [(rows[line["id"]], line) for line in lines if "turn" in line]
    summary = {}

    def add(name: str, chosen: list[tuple[dict, dict]]) -> None:
        summary[name] = round(sum(line["exact"] for _, line in chosen) / len(chosen), 4)
        guesses = [((row["kind"], *line["prompt"].split()[:3]), line["references"][0]) for row, line in chosen]
        summary[f"{name}_chance"] = round(best_guess_share(guesses), 4)

    for group in ("seen", "unseen"):
        own = [(row, line) for row, line in answered if row["group"] == group]
        add(f"turns_{group}", [(row, line) for row, line in own if row["kind"] == "scene"])
        add(f"two_pictures_{group}", [(row, line) for row, line in own if row["kind"] != "scene"])
    add("two_pictures", [(row, line) for row, line in answered if row["kind"] != "scene"])
    for kind in PAIR_QUESTIONS:
        add(f"two_pictures_{kind.replace(' ', '_')}", [(row, line) for row, line in answered if row["kind"] == kind])
    return summary
