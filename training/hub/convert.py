"""Bridge checkpoint <-> full checkpoint. The new one is read back and compared before it gets its name."""

from pathlib import Path

import torch
from transformers import AutoModel

from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from blipren.training.files import complete_or_absent_folder


def convert_checkpoint(model_path: str | Path, out: Path, kind: str) -> None:
    """Load a checkpoint (folder or Hub id), save it as `kind` ("full" or "bridge"), and compare all weights.

    Raises:
        UserError: it does not load, knows no base models, or a bridge would lose weights that were trained.
    """
    model, processor = load_checkpoint(str(model_path), AutoModel)
    with complete_or_absent_folder(out) as folder:
        try:
            model.save_pretrained(folder) if kind == "full" else model.save_bridge(folder)
        except ValueError as error:
            raise UserError(f"{model_path} cannot be a {kind} checkpoint: {error}") from error
        processor.save_pretrained(folder)
        saved = load_checkpoint(str(folder), AutoModel)[0].state_dict()
        for name, value in model.state_dict().items():
            if name not in saved or not torch.equal(value, saved[name].to(value.dtype)):
                raise UserError(
                    f"{model_path} cannot be a {kind} checkpoint: its {name} differs from its base model's, so it was "
                    "trained and would be lost"
                )
