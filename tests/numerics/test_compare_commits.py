"""The comparison of two commits sees one changed bit, one lost value, one lost file, and passes over times."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.numerics import compare_commits

LOG = [
    {"kind": "train", "step": 1, "loss": 2.5, "grad_norm": 0.0, "tokens_per_second": 100.0, "seconds": 1.5},
    {"kind": "sample", "step": 1, "image": "a.png", "text": "a red square"},
    {"kind": "sample", "step": 1, "image": "b.png", "text": "a blue circle"},
]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_cache(folder: Path, features: np.ndarray, ids: list[list[list[int]]]) -> None:
    """Feature and token columns in Arrow streams, as `blipren embed` lays them out."""
    columns = {"id": ["a", "b"], "patch_features": list(features)}
    kinds = {"id": datasets.Value("string"), "patch_features": datasets.List(datasets.Value("float16"), length=4)}
    splits = {"train": datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))}
    datasets.DatasetDict(splits).save_to_disk(folder)
    tokens = datasets.Dataset.from_dict({"answer_ids": ids})
    datasets.DatasetDict({"train": tokens}).save_to_disk(folder / "tokens" / "0123456789abcdef")


def features() -> np.ndarray:
    return np.arange(8, dtype=np.float16).reshape(2, 4)


IDS = [[[5, 2], [7, 2]], [[9, 2]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An output folder with one file of each kind."""
    folder = tmp_path_factory.mktemp("outputs") / "out"
    (folder / "trained").mkdir(parents=True)
    write_lines(folder / "trained" / "log.jsonl", LOG)
    save_file({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, folder / "trained" / "model.safetensors")
    write_lines(folder / "predictions.jsonl", [{"id": "a.png", "caption": "a square", "tokens": [3, 4]}])
    metrics = {"captioning": {"CIDEr": 0.1, "METEOR": None}, "seconds": 3, "versions": {"torch": "2"}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_cache(folder / "cache", features(), IDS)
    return folder


@pytest.fixture
def pair(written, tmp_path):
    """Two equal output folders."""
    folders = tmp_path / "before", tmp_path / "now"
    for folder in folders:
        shutil.copytree(written, folder)
    return folders


def differing(pair, capsys) -> list[str]:
    """What was printed of files that differ; checks that the number returned is theirs."""
    count = compare_commits.compare_folders(*pair)
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERENT")]
    assert count == len(found)
    return found


def test_equal_outputs_are_equal_and_all_are_read(pair, capsys):
    assert compare_commits.compare_folders(*pair) == 0
    printed = capsys.readouterr().out
    for name in (
        "trained/log.jsonl: 12 values",  # without speed and seconds
        "trained/model.safetensors: 2 values",
        "predictions.jsonl: 4 values",
        "metrics.json: 1 values",
        "cache/train/*.arrow: 2 values",
        "cache/tokens/*/train/*.arrow: 1 values",
    ):
        assert f"same       {name}" in printed


def change_log(row: int, **values):
    rows = [dict(line) for line in LOG]
    rows[row].update(values)
    return lambda folder: write_lines(folder / "trained" / "log.jsonl", rows)


def change_tensors(change):
    def apply(folder):
        path = folder / "trained" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return apply


def flip_lowest_bit(tensors):
    tensors["w"].view(torch.int32)[1, 2] ^= 1


def change_cache(change, ids=IDS):
    def apply(folder):
        values = features()
        change(values)
        shutil.rmtree(folder / "cache")
        write_cache(folder / "cache", values, ids)

    return apply


def change_metric(folder):
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text.replace("0.1", repr(math.nextafter(0.1, 1))))


def drop_logged_loss(folder):
    write_lines(folder / "trained" / "log.jsonl", [{k: v for k, v in line.items() if k != "loss"} for line in LOG])


CHANGES = {
    "last bit of a logged loss": (
        change_log(0, loss=math.nextafter(2.5, 3)),
        "trained/log.jsonl: 1 of 12 values, first train 1 #1: loss: before 2.5, now 2.5000000000000004",
    ),
    "sign of a zero": (change_log(0, grad_norm=-0.0), "grad_norm: before 0.0, now -0.0"),
    "sample caption": (change_log(2, text="a blue cross"), "text: before 'a blue circle', now 'a blue cross'"),
    "logged value lost": (drop_logged_loss, "loss: before 2.5, now missing"),
    "lowest bit of a weight": (change_tensors(flip_lowest_bit), "trained/model.safetensors: 1 of 2 values, first w: "),
    "shape of a weight": (change_tensors(lambda t: t.update(w=t["w"].reshape(3, 2))), "first w: before 'F32 [2, 3]"),
    "weight lost": (change_tensors(lambda t: t.pop("b")), "first b: before"),
    "weight added": (change_tensors(lambda t: t.update(c=t["b"] + 1)), "first c: before missing"),
    "last bit of a metric": (change_metric, "metrics.json: 1 of 1 values, first captioning CIDEr: before 0.1, now"),
    "cached feature": (
        change_cache(lambda values: values.view(np.uint16).__ixor__(np.eye(2, 4, dtype=np.uint16))),
        "cache/train/*.arrow: 1 of 2 values, first patch_features",
    ),
    "token id": (
        change_cache(lambda values: None, [[[5, 2], [8, 2]], [[9, 2]]]),
        "cache/tokens/*/train/*.arrow: 1 of 1 values, first answer_ids",
    ),
    "ends of answers": (
        change_cache(lambda values: None, [[[5, 2, 7], [2]], [[9, 2]]]),
        "cache/tokens/*/train/*.arrow: 1 of 1 values, first answer_ids",
    ),
    "file lost": (lambda folder: (folder / "predictions.jsonl").unlink(), "predictions.jsonl: 4 of 4 values"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_found_and_named(name, pair, capsys):
    change, message = CHANGES[name]
    change(pair[1])
    found = differing(pair, capsys)
    assert len(found) == 1 and message in found[0], found


def test_times_and_new_values_are_no_difference(pair, capsys):
    change_log(0, tokens_per_second=7.0, seconds=9.0, loss_without_smoothing=2.0)(pair[1])
    (pair[1] / "finished.json").write_text('{"steps": 1}')
    assert compare_commits.compare_folders(*pair) == 0
    printed = capsys.readouterr().out
    assert "same       trained/log.jsonl: 12 values, 1 new" in printed and "new        finished.json" in printed


def test_changed_settings_are_laid_over_those_of_the_commit_before():
    before = compare_commits.command_arguments("train online", {})
    assert before[:4] == ["train", "untrained", "scenes", "trained-online"] and "--online" in before
    changed = {"train online": {"online": None, "augment": False, "source": "images"}}
    now = compare_commits.command_arguments("train online", changed)
    assert "--online" not in now and "--no-augment" in now and now[-2:] == ["--source", "images"]
    assert set(compare_commits.CHANGED_SETTINGS) <= set(compare_commits.RUNS)


def test_quickstart_folders_are_compared_without_their_times(pair, capsys):
    arguments = ["--quickstart", *map(str, pair)]
    for folder, seconds in zip(pair, (200.1, 260.7)):
        (folder / "summary.json").write_text(json.dumps({"cider": 0.9, "seconds": seconds}))
    assert compare_commits.main(arguments) == 0
    (pair[1] / "summary.json").write_text(json.dumps({"cider": 0.8, "seconds": 200.1}))
    assert compare_commits.main(arguments) == 1
    assert "summary.json: 1 of 1 values, first cider: before 0.9, now 0.8" in capsys.readouterr().out


@pytest.mark.slow
def test_the_working_tree_gives_the_numbers_of_the_commit_before():
    if not compare_commits.has_commit(compare_commits.BEFORE_COMMIT):
        pytest.skip(f"commit {compare_commits.BEFORE_COMMIT} is not in this clone's history (git fetch --unshallow)")
    done = subprocess.run([sys.executable, compare_commits.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
