"""`blipren train --push-to` from the command line, and its model loaded by id in a process without our package."""

import json
import os
import subprocess
import sys

import pytest
import torch

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.cli import main
from tests.hub.fresh import fresh_result
from tests.hub.tiny import TINY_QFORMER, picture, write_llm, write_vision

REPO = "user/blipren-tiny"
LOAD = f"""
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({REPO!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({REPO!r}, trust_remote_code=True)
inputs = processor(images=Image.open("photos/0.png"), return_tensors="pt")
with torch.no_grad():
    result = model(**inputs).logits[0, -1].tolist()
"""


def test_a_trained_model_is_on_the_hub_and_loads_there(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rows = []
    for number in range(12):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
        split = "train" if number < 8 else "validation"
        rows.append({"file_name": f"{number}.png", "caption": f"two dogs run on a beach {number}", "split": split})
    (tmp_path / "photos" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_vision(tmp_path / "vision")
    write_llm(tmp_path / "llm")
    shape = ["--queries", "4", "--qformer", json.dumps(TINY_QFORMER)]
    assert main(["new", "model", "--vision", "vision", "--llm", "llm", *shape]) == 0
    assert main(["embed", "model", "photos", "cache"]) == 0
    command = [sys.executable, "-m", "blipren.training.cli", "train", "model", "cache", "run", "--max-steps", "3"]
    environment = os.environ | hub.environment(str(tmp_path / "home")) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--device", "cpu", "--push-to", REPO], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{REPO}/tree/main" in done.stdout
    repository = hub.repository(REPO)
    assert repository.private
    card = repository.read("main", "README.md").decode()
    assert "| optimizer updates | 3 |" in card and str(tmp_path) not in card
    found = fresh_result(LOAD, tmp_path, hub.environment(str(tmp_path / "fresh-home")))
    model, processor = (kind.from_pretrained("run") for kind in (BliprenForConditionalGeneration, BliprenProcessor))
    with torch.no_grad():
        expected = model(**processor(images=picture(0), return_tensors="pt")).logits[0, -1].tolist()
    assert found == pytest.approx(expected, abs=1e-6)
