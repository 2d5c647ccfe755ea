"""What the tests of the caption stage share: drawn pictures, a tiny model, the command in a process of its own."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.settings import Settings
from tests import tiny_models
from tests.common.processes import Program, process_server

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30)}


def draw_dataset(folder: Path, images: int = 44) -> Path:
    """A folder data set: one shape a picture, two captions, one question; a split column."""
    folder.mkdir()
    chance, rows = random.Random(0), []
    for i in range(images):
        colour, shape = chance.choice(sorted(COLOURS)), chance.choice(["circle", "square"])
        picture = Image.new("RGB", (32, 32), (200 + i, 240, 240))
        draw = ImageDraw.Draw(picture)
        x, y = chance.randint(2, 12), chance.randint(2, 12)
        (draw.ellipse if shape == "circle" else draw.rectangle)([x, y, x + 14, y + 14], fill=COLOURS[colour])
        picture.save(folder / f"{i}.png")
        rows.append(
            {
                "file_name": f"{i}.png",
                "caption": [f"A {colour} {shape} .", f"The {shape} is {colour} ."][: 1 + i % 2],
                "short_caption": f"{colour} {shape}" if i % 3 else "",
                "question": "What colour ?",
                "answer": colour,
                "split": "train" if i < 32 else "validation" if i < 40 else "test",
            }
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_model(folder: Path, vision: Path, llm: Path, **changes) -> Path:
    """A bridge checkpoint over the two bases."""
    shape = {"connector": "qformer", "num_queries": 4} | changes
    sizes = {"qformer": tiny_models.QFORMER} if shape["connector"] == "qformer" else {}
    torch.manual_seed(0)
    BliprenForConditionalGeneration.from_vision_text_pretrained(vision, llm, **sizes | shape).save_bridge(folder)
    known = {k: shape[k] for k in ("connector", "num_queries", "tiles") if k in shape}
    BliprenProcessor.from_vision_text_pretrained(vision, llm, **known).save_pretrained(folder)
    return folder


def write_command(settings: Settings) -> list[str]:
    """The command line of these settings, which are in a recipe beside its folder."""
    name = type(settings).__module__.rpartition(".")[2]
    recipe = Path(settings.out).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({name: dataclasses.asdict(settings)}))
    return [name, "--config", str(recipe)]


def run_command(settings: Settings, processes: int = 1) -> subprocess.Popen:
    """The command of these settings as a user starts it; more than one process under torchrun."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["blipren.training.cli", *write_command(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def fork_command(settings: Settings, processes: int = 1) -> Program:
    """The command of these settings in processes of its own that start at once."""
    output = Path(settings.out).with_suffix(".txt")
    return process_server().start(write_command(settings), output, processes=processes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint folder."""
    return load_file(folder / "model.safetensors")


def events(folder: Path, kind: str) -> list[dict]:
    """The lines of one kind in a run's log."""
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["kind"] == kind]
