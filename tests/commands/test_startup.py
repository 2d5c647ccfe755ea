"""`import blipren`, --help, wrong use and missing inputs: answered in a process that imports no torch."""

import json
import shlex
import subprocess
import sys

import pytest

from blipren.training.cli import command_names

RUN = """
import json, sys
from blipren.training.cli import main
try:
    status = main(json.loads(sys.argv[1]))
except SystemExit as stop:
    status = stop.code
print(json.dumps([status, sorted({"torch", "transformers", "numpy"} & set(sys.modules))]))
"""


def run(arguments: list[str], folder=None) -> tuple[int, str]:
    """Exit status and error text of a command that must not have imported torch, transformers or numpy."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(arguments)], capture_output=True, text=True, cwd=folder
    )
    status, imported = json.loads(result.stdout.splitlines()[-1])
    assert not imported
    return status, result.stderr


def test_import_of_the_package():
    code = "import sys, blipren; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["", *command_names()])
def test_help(command):
    assert run([*command.split(), "--help"]) == (0, "")


@pytest.mark.parametrize("command", [name for name in command_names() if name != "quickstart"])
def test_missing_arguments(command):
    status, error = run([command])
    assert status == 2 and "needs" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("quickstart --seed many", "invalid int value"),
        ("new out --vision a/b --llm c --qformer '{depth: 3}'", "unknown name 'depth' in qformer"),
        ("new out --vision a/b --llm c --projector-options '{hidden_size: 3}'", "unknown name 'hidden_size'"),
        ("doctor user/name --steps 3", "steps is 3"),
        ("embed user/name data cache --batch-size 0", "batch_size is 0"),
        ("align user/name cache out --itc hard", "invalid choice"),
        ("train user/name cache out --epochs 0", "epochs is 0"),
        ("train user/name cache=lots out", "'lots' is no number"),
        ("train user/name cache=-1 out", "with a weight above 0"),
        ("evaluate user/name data out --tasks juggling", "juggling"),
        ("evaluate - data out", "a model is needed"),
        ("push model nobody", "must be user/name"),
        ("train --config no-such-recipe", "neither a file nor one of the recipes"),
    ],
)
def test_wrong_use(line, message):
    status, error = run(shlex.split(line))
    assert status == 2 and message in error


@pytest.mark.parametrize(
    "line, message",
    [
        ("new out --vision ./nothing --llm a/b", "there is no folder ./nothing"),
        ("new out --vision a/b --llm /no/where/at/all", "there is no folder /no/where/at/all"),
        ("new taken --vision a/b --llm c/d", "taken exists and is not an empty folder"),
        ("doctor nothing", "no checkpoint at nothing"),
        ("doctor taken", "taken is not a checkpoint: it has no config.json"),
        ("doctor foreign", "model_type 'llama'"),
        ("embed nothing photos cache", "no checkpoint at nothing"),
        ("embed user/name ./nowhere cache", "./nowhere does not exist"),
        ("embed user/name photos.jsonl cache", "photos.jsonl does not exist"),
        ("embed user/name taken=2,../nowhere=1 cache", "../nowhere does not exist"),
        ("align user/name nowhere out", "nowhere is not a feature cache"),
        ("train nothing nowhere out", "no checkpoint at nothing"),
        ("train user/name taken=2,nowhere out", "taken is not a feature cache"),
        ("train user/name unfinished out", "unfinished is not finished"),
        ("train user/name ./nowhere out --online", "./nowhere does not exist"),
        ("evaluate nothing photos out", "no checkpoint at nothing"),
        ("evaluate user/name ./nowhere out", "./nowhere does not exist"),
        ("evaluate - photos out --predictions nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("compare taken taken", "taken is not a finished evaluation: it has no metrics.json"),
        ("caption nothing photo.jpg", "no checkpoint at nothing"),
        ("caption user/name photo.jpg", "there is no file photo.jpg"),
        ("chat nothing", "no checkpoint at nothing"),
        ("demo nothing", "no checkpoint at nothing"),
        ("convert nothing out", "no checkpoint at nothing"),
        ("import ./nothing out", "there is no folder ./nothing"),
        ("push nothing user/name", "nothing is not a folder"),
    ],
)
def test_missing_inputs(line, message, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "unfinished" / "units").mkdir(parents=True)
    status, error = run(shlex.split(line), tmp_path)
    assert status == 1 and message in error and error.count("\n") == 1
