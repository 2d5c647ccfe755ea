"""Conversations about scenes: several turns about one picture, and questions about two pictures at once.

    scenes -> new -> embed -> train -> conversations -> embed -> train -> evaluate

First the bridge learns captions and single questions with a frozen language model, as in the world of captions. Then it
learns conversations, and the language model with it, at a lower rate: it has seen neither two pictures nor two questions in
one text. OUT holds `pictures/` and `scenes/` (with conversations.jsonl), their caches, `untrained/`, `captions/` and `run/`
(the two trainings), `after/` (evaluation), `model/` and `summary.json`.
"""

import json
import time
from pathlib import Path

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.quickstart.conversation_scenes import best_guess_share, write_conversations
from blipren.training.quickstart.scenes import write_scenes
from blipren.training.quickstart.steps import TOWERS, export_model, run_step

DURATION = "takes several minutes on two cores"
RECIPE = "quickstart-conversations"


def run_world(settings: QuickstartSettings, out: Path) -> dict:
    """Run all steps. Returns the accuracy on held-out scenes by kind of question, with what guessing reaches."""
    started = time.perf_counter()
    names = ("pictures", "untrained", "captions-cache", "captions", "cache", "run", "model")
    pictures, untrained, captions_cache, captions, cache, run, model = (out / name for name in names)
    write_scenes(pictures, settings.seed)
    data = write_conversations(out / "scenes", settings.seed)
    print(f"drew scenes in {pictures} and conversations in {data} ({time.perf_counter() - started:.0f} s)")
    run_step("new", out=untrained, vision=TOWERS / "vision", llm=TOWERS / "llm", seed=settings.seed)
    run_step("embed", model=untrained, dataset=pictures, cache=captions_cache)
    run_step("train", model=untrained, cache=captions_cache, out=captions, seed=settings.seed)
    run_step("embed", recipe=RECIPE, model=captions, dataset=data, cache=cache)
    run_step("train", recipe=RECIPE, model=captions, cache=cache, out=run, seed=settings.seed)
    export_model(run, model)
    run_step("evaluate", recipe=RECIPE, model=model, dataset=data, out=out / "after", run=run)
    summary = summarise(data, out / "after")
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):<44} {value:>8.1%}")
    return summary


def summarise(data: Path, evaluation: Path) -> dict:
    """Return accuracies on the test split: of turns about one scene by group, and of questions about two by kind.

    `chance` is the best that is possible without a picture, `one_picture` with the number of shapes in the first.
    """
    rows = {row["id"]: row for row in map(json.loads, data.read_text(encoding="utf-8").splitlines())}
    lines = [json.loads(line) for line in (evaluation / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    answered = [(rows[line["id"]], line) for line in lines if "turn" in line]
    summary = {}

    def add(name: str, chosen: list[dict]) -> None:
        summary[name] = round(sum(line["exact"] for line in chosen) / len(chosen), 4)
        guesses = [(" ".join(line["prompt"].split()[:3]), line["references"][0]) for line in chosen]
        summary[f"{name}_chance"] = round(best_guess_share(guesses), 4)

    for group in ("seen", "unseen"):
        add(f"turns_{group}", [line for row, line in answered if row["kind"] == "scene" and row["group"] == group])
        add(
            f"two_pictures_{group}",
            [line for row, line in answered if row["kind"] != "scene" and row["group"] == group],
        )
    add("two_pictures", [line for row, line in answered if row["kind"] != "scene"])
    for kind in ("different", "same number", "more"):
        add(f"two_pictures_{kind.replace(' ', '_')}", [line for row, line in answered if row["kind"] == kind])
    return summary
