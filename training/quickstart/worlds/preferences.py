"""Preferences: captions of scenes before and after dpo, from the model of the world of captions.

    captions -> crowded scenes -> pairs -> embed -> dpo -> evaluate

The crowded scenes mostly have three objects; nothing in them is held out. OUT holds `captions/` (all of the world of
captions), `crowded/`, `pairs/` (a true caption of each crowded scene against a caption of a similar one), `cache/`, `dpo/`
(the run, which loads as a checkpoint), `after/` (its evaluation on the held-out scenes of the captions) and `summary.json`.
"""

import json
from pathlib import Path

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.engine.preference_settings import check_trl
from blipren.training.quickstart.scenes import Split, write_scenes
from blipren.training.quickstart.similar_scenes import iterate_crowded_rows, write_preferences
from blipren.training.quickstart.steps import run_step
from blipren.training.quickstart.worlds import captions

DURATION = "takes at most 20 minutes on two cores"
RECIPE = "quickstart-preferences"
CROWDED_SPLITS = (Split("train", "seen", 6000), Split("validation", "seen", 100))


def run_world(settings: QuickstartSettings, out: Path) -> dict:
    """Run all steps. Returns the figures on held-out scenes before and after dpo."""
    check_trl()  # before the minutes that the captions take
    captions.run_world(settings, out / "captions")
    return run_preferences(settings, out)


def run_preferences(settings: QuickstartSettings, out: Path) -> dict:
    """Run the steps behind the world of captions, whose files are in OUT/captions."""
    first, crowded, pairs, cache, run = (out / name for name in ("captions", "crowded", "pairs", "cache", "dpo"))
    model, before, after = first / "model", first / "after", out / "after"
    prompt = json.loads((model / "processor_config.json").read_text(encoding="utf-8"))["prompts"][0]
    print(f"drew {write_scenes(crowded, settings.seed, CROWDED_SPLITS, iterate_crowded_rows)} scenes in {crowded}")
    print(f"wrote {write_preferences(crowded, pairs, settings.seed, prompt)} preferences in {pairs}")
    run_step("embed", recipe=RECIPE, model=model, dataset=pairs, cache=cache)
    run_step("dpo", recipe=RECIPE, model=model, cache=cache, out=run, seed=settings.seed)
    run_step("evaluate", recipe=RECIPE, model=run, dataset=first / "scenes", out=after, before=before, run=run)
    summary = summarise({"before": before, "after": after})
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):<44} {value:>8.1%}")
    return summary


def summarise(evaluations: dict[str, Path]) -> dict[str, float]:
    """Return the figures of each evaluation on held-out scenes of both groups: NAME_GROUP_STAGE."""
    summary = {}
    for stage, folder in evaluations.items():
        truth = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["hallucination"]
        for group in ("seen", "unseen"):
            for name in ("captions_true", "hallucinated_objects", "attribute_recall"):
                summary[f"{name}_{group}_{stage}"] = round(truth[group][name], 4)
    return summary
