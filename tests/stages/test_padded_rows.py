"""A language model that cannot take shared prefixes is trained on padded rows, and the reason is shown."""

import json

from blipren.training.stages import train as caption
from tests import tiny_models
from tests.stages.tools import events, make_model


def test_training_falls_back_to_padded_rows_and_says_why(settings, tmp_path, bases, cache_dir, capsys):
    llm = tiny_models.make_llm(tmp_path / "mistral", "mistral", sliding_window=8)
    model = make_model(tmp_path / "model", bases[0], llm)
    caption.train(settings(model=str(model)))
    output = capsys.readouterr().out
    assert "padded rows, one for each answer" in output and "window of 8 tokens is shorter" in output
    assert events(tmp_path / "run", "train")[-1]["useful_tokens"] < 1.0
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["steps"] == 6
