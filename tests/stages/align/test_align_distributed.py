"""The stage on two processes ends with the weights of one process: contrast, negatives and counts reach over both."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_two_processes_end_like_one(settings, tmp_path):
    values = dataclasses.asdict(settings(max_steps=3, eval_every=3, micro_batch_size=4, learning_rate=1e-3))
    del values["out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = []
    for processes in (1, 2):
        save_to = tmp_path / f"{processes}.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        command = [
            sys.executable,
            *launch,
            str(SCRIPT),
            str(tmp_path / f"run{processes}"),
            str(save_to),
            json.dumps(values),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(save_to))
    one, two = found
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.allclose(two[name], weight, atol=1e-7), (name, (two[name] - weight).abs().max())
