"""The demo of a model, at the commit that it was published with: the page of `blipren demo`."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download

from blipren.training.demo.page import build_page, launch
from blipren.training.demo.visit import Limits
from blipren.training.evaluation.generation import load_model

SOURCE = json.loads((Path(__file__).parent / "model.json").read_text())
folder = snapshot_download(SOURCE["model"], revision=SOURCE["revision"])
page = build_page(*load_model(folder), SOURCE["model"], Limits(seconds=60, tokens=128))

if __name__ == "__main__":
    launch(page)
