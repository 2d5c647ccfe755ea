"""Run by test_align_distributed.py: steps of the stage without dropout, in one process or in one of two."""

import os
import sys

import torch

from blipren.training.commands.align import AlignSettings
from blipren.training.engine.run_folder import RunFolder
from blipren.training.stages import align as stage


def main(out: str, save_to: str, values: dict) -> None:
    settings = AlignSettings(**values, out=out)
    folder = RunFolder(out, writes=os.environ.get("RANK", "0") == "0")
    trainer = stage.build_trainer(settings, folder)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    trainer.model.double()  # so that only a wrong sum can differ
    trainer.train()
    if folder.writes:
        torch.save({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}, save_to)


if __name__ == "__main__":
    import json

    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
