"""The stage on two processes ends with the weights of one process: contrast, negatives and counts reach over both."""

import dataclasses
import json
from pathlib import Path

import torch

from tests.common.processes import process_server

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_two_processes_end_like_one(settings, tmp_path):
    values = dataclasses.asdict(settings(max_steps=3, eval_every=3, micro_batch_size=4, learning_rate=1e-3))
    del values["out"]
    found = []
    for processes in (1, 2):
        save_to = tmp_path / f"{processes}.pt"
        words = [str(tmp_path / f"run{processes}"), str(save_to), json.dumps(values)]
        program = process_server().start(words, save_to.with_suffix(".txt"), str(SCRIPT), processes)
        output, _ = program.communicate()
        assert program.returncode == 0, output
        found.append(torch.load(save_to))
    one, two = found
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, atol=1e-7), (name, (two[name] - weight).abs().max())
