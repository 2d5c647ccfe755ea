"""The world of boxes at small size: every step runs, and the summary holds every figure."""

from PIL import Image

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.quickstart.scenes import Split
from blipren.training.quickstart.worlds import boxes


def test_the_world_runs_at_small_size(tmp_path, monkeypatch):
    real = boxes.run_step

    def run_step(command, recipe="quickstart", **values):
        small = {"max_steps": 2, "batch_size": 4, "eval_every": 2} if command == "train" else {}
        small |= {"workers": 0} if command == "embed" else {}
        small |= {"max_new_tokens": 8} if command in ("evaluate", "caption") else {}
        real(command, recipe, **values | small)

    monkeypatch.setattr(boxes, "run_step", run_step)
    splits = (Split("train", "seen", 12), Split("validation", "seen", 2))
    monkeypatch.setattr(boxes, "SPLITS", (*splits, Split("test", "seen", 2), Split("test", "unseen", 2)))
    summary = boxes.run_world(
        QuickstartSettings(out=str(tmp_path), world="boxes", seed=7), tmp_path
    )  # whose scenes have several of a kind
    assert summary["held_out_scenes"] == 4
    for group in ("seen", "unseen"):
        for name in (*boxes.SCORES, "captions_true", "accuracy_centre_box", "accuracy_most_frequent_box"):
            assert 0 <= summary[f"{name}_{group}"] <= 1, name
    assert Image.open(tmp_path / "found.png").width > 500 and Image.open(tmp_path / "boxes.png").width >= 480
    assert (tmp_path / "model" / "model.safetensors").is_file()
