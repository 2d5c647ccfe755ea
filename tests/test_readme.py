"""Every command and every example of the README, run as written, with its Hub ids resolved to tiny models.

A Hub on loopback holds what stands in for the base models: the quickstart's towers, which are really trained. Only
sizes and steps are taken down, by flags behind a command.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from blipren.training.cli import load_recipe
from blipren.training.quickstart.scenes import Scene, draw_scene, iterate_rows
from tests.common.processes import ProcessServer
from tests.hub.loopback.server import running_hub

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOWERS = ROOT / "training" / "quickstart" / "towers"
PHOTOS = 48
UPLOAD = """
import json, sys
from huggingface_hub import HfApi
for name, folder in json.loads(sys.argv[1]).items():
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)
"""  # in a process of its own: this one is kept off the Hub
SMALL = {
    "new": ["--queries", "8", "--qformer", "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}"],
    "train": ["--max-steps", "2", "--batch-size", "8", "--eval-every", "2"],
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def write_photos(folder: Path) -> None:
    """An image folder as the README describes it."""
    (folder / "images").mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number, row in zip(range(1, PHOTOS + 1), iterate_rows(seed=0)):
            name = f"images/{number:04}.png"
            draw_scene(Scene.from_json(row["scene"]), 64).save(folder / name)
            metadata.write(json.dumps({"file_name": name, "captions": row["captions"]}) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photos, and the environment of a Hub on loopback that holds the base models."""
    folder = tmp_path_factory.mktemp("readme")
    write_photos(folder / "photos")
    recipes = " ".join(json.dumps(load_recipe(name)) for name in re.findall(r"--config ([\w.-]+)", blocks("bash")[0]))
    ids = set(re.findall(r"\b(?:google|HuggingFaceTB)/[\w.-]+", README + recipes))
    assert ids, "the README names no base models"
    with running_hub() as hub:
        environment = hub.environment(str(folder / "hf-home"))
        environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        towers = {name: str(TOWERS / ("vision" if name.startswith("google/") else "llm")) for name in sorted(ids)}
        run([sys.executable, "-c", UPLOAD, json.dumps(towers)], (folder, environment))
        yield folder, environment


def run(arguments: list[str], place) -> subprocess.CompletedProcess:
    folder, environment = place
    result = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, f"{shlex.join(arguments)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def test_the_commands_in_order_then_the_examples(place):
    """The shell block makes and publishes the model that the Python blocks load by its Hub id."""
    (commands,) = blocks("bash")
    folder, environment = place
    server = ProcessServer(environment)
    for line in commands.strip().splitlines():
        program, command, *rest = shlex.split(line)
        assert program == "blipren"
        started = server.start([command, *rest, *SMALL.get(command, [])], folder / f"{command}.txt", cwd=folder)
        output, _ = started.communicate()
        assert started.returncode == 0, f"{line}\n{output[-3000:]}"
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert metrics["counts"]["images"] > 0 and "CIDEr" in metrics["captioning"]
    examples = blocks("python")
    assert len(examples) == 2
    shown = run([sys.executable, "-c", examples[0]], place).stdout
    assert "generated_text" in shown
    run([sys.executable, "-c", examples[1].replace("num_queries=32", "num_queries=4")], place)
    assert (folder / "bridge" / "model.safetensors").is_file()


def test_the_two_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("text")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make quickstart" in ci and "make test" in ci


def test_everything_that_the_readme_links_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
