"""The world of preferences at small size: every step runs, and the summary holds every figure of both models."""

import importlib.util

import pytest

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.errors import UserError
from blipren.training.quickstart import scenes, steps
from blipren.training.quickstart.scenes import Split
from blipren.training.quickstart.worlds import captions, preferences

SPLITS = (
    Split("train", "seen", 12),
    Split("validation", "seen", 2),
    Split("test", "seen", 4),
    Split("test", "unseen", 4),
)
STEPS = {"max_steps": 2, "batch_size": 4, "eval_every": 2, "generate_samples": 0}
SMALL = {
    "embed": {"workers": 0},
    "train": STEPS,
    "dpo": STEPS,
    "evaluate": {"max_new_tokens": 4, "resamples": 20, "tasks": ["captioning"], "report": False, "meteor": False},
}


def test_the_world_runs_at_small_size(tmp_path, monkeypatch):
    def run_step(command, recipe="quickstart", **values):
        if command not in ("doctor", "caption"):
            steps.run_step(command, recipe, **values | SMALL.get(command, {}))

    for world in (captions, preferences):
        monkeypatch.setattr(world, "run_step", run_step)
    monkeypatch.setattr(captions, "write_scenes", lambda folder, seed: scenes.write_scenes(folder, seed, SPLITS))
    for name in (
        "draw_grid",
        "summarise",
        "print_summary",
    ):  # figures of captions alone, of which this world makes others
        monkeypatch.setattr(captions, name, lambda *arguments: {})
    monkeypatch.setattr(preferences, "CROWDED_SPLITS", SPLITS[:2])
    settings = QuickstartSettings(out=str(tmp_path), world="preferences", align=False)
    summary = preferences.run_world(settings, tmp_path)
    names = ("captions_true", "hallucinated_objects", "attribute_recall")
    stages = ("before", "after")
    assert summary.keys() == {f"{n}_{g}_{s}" for n in names for g in ("seen", "unseen") for s in stages}
    assert all(0 <= value <= 1 for value in summary.values())
    assert (tmp_path / "dpo" / "model.safetensors").is_file()


def test_world_without_trl_is_refused_before_it_draws(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install blipren\[trl\]"):
        preferences.run_world(QuickstartSettings(out=str(tmp_path)), tmp_path)
    assert not any(tmp_path.iterdir())
