"""The world of conversations, at small size, and its figures."""

import json

import pytest

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.quickstart import steps
from blipren.training.quickstart.conversation_scenes import Part, write_conversations
from blipren.training.quickstart.worlds import conversations

PARTS = (Part("train", "seen", 12, 12), Part("test", "seen", 6, 12), Part("test", "unseen", 6, 12))
SMALL = {
    "embed": {"workers": 0},
    "train": {"max_steps": 2, "batch_size": 8, "eval_every": 2, "generate_samples": 0},
    "evaluate": {"resamples": 20, "max_new_tokens": 3},
}


def write_small(folder, seed):
    return write_conversations(folder, seed, PARTS)


def test_the_world_runs_at_small_size(tmp_path, monkeypatch):
    def run_step(command, recipe="quickstart", **values):
        steps.run_step(command, recipe, **values | SMALL.get(command, {}))

    monkeypatch.setattr(conversations, "run_step", run_step)
    monkeypatch.setattr(conversations, "write_conversations", write_small)
    summary = conversations.run_world(QuickstartSettings(out=str(tmp_path), world="conversations"), tmp_path)
    names = {f"{kind}_{group}" for kind in ("turns", "two_pictures") for group in ("seen", "unseen")}
    names |= {"two_pictures", *(f"two_pictures_{kind}" for kind in ("different", "same_number", "more"))}
    assert summary.keys() == names | {f"{name}_chance" for name in names}
    assert all(0 <= value <= 1 for value in summary.values())
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_figures_are_of_each_kind_of_question(tmp_path):
    """Every answer about one scene is right, and of those about two all that say "no" or "left"."""
    data = write_small(tmp_path / "scenes", 0)
    lines = []
    for row in map(json.loads, data.read_text().splitlines()):
        for turn, message in enumerate(row["messages"]):
            if row["split"] == "test" and message["role"] == "assistant":
                content = row["messages"][turn - 1]["content"]
                asked = "".join(part.get("text", "") for part in content) if isinstance(content, list) else content
                right = row["kind"] == "scene" or message["content"] in ("no", "left")
                line = {"id": row["id"], "turn": turn, "prompt": asked, "references": [message["content"]]}
                lines.append(line | {"exact": float(right)})
    (tmp_path / "after").mkdir()
    (tmp_path / "after" / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = conversations.summarise(data, tmp_path / "after")
    assert summary["turns_seen"] == summary["turns_unseen"] == 1 and summary["two_pictures_different"] == 0
    pairs = [line for line in lines if line["id"].startswith("pair")]
    assert summary["two_pictures"] == pytest.approx(sum(line["exact"] for line in pairs) / len(pairs), abs=1e-4)
    chances = [summary[f"two_pictures_{kind}_chance"] for kind in ("different", "same_number", "more")]
    assert len(pairs) == 24 and 0.25 <= min(chances) <= summary["two_pictures_chance"] <= max(chances)
