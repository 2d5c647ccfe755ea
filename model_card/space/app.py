"""The demo of a model, at the commit that it was published with: the page of `blipren demo`."""

import json
from importlib.util import find_spec
from pathlib import Path

if find_spec("spaces") is not None:  # ZeroGPU lends a GPU for each answer; the package comes before torch
    import spaces

    on_device = spaces.GPU(duration=60)
else:

    def on_device(function):
        """Compute on this machine's own device."""
        return function


from huggingface_hub import snapshot_download  # noqa: E402

from blipren.training.demo.page import build_page, launch  # noqa: E402
from blipren.training.demo.visit import Limits  # noqa: E402
from blipren.training.evaluation.generation import load_model  # noqa: E402

HERE = Path(__file__).parent
SOURCE = json.loads((HERE / "model.json").read_text())
folder = snapshot_download(SOURCE["model"], revision=SOURCE["revision"])
models = [(SOURCE["model"], *load_model(folder))]
page = build_page(models, Limits(seconds=60, tokens=128), sorted((HERE / "examples").glob("*.png")), on_device)

if __name__ == "__main__":
    launch(page)
