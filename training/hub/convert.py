"""`blipren convert`: bridge checkpoint <-> full checkpoint, proven equal before it is written.
`blipren import`: a BLIP-2 or InstructBLIP model of transformers into ours.
"""

from pathlib import Path

import torch
from transformers import AutoModel

from blipren import BliprenProcessor
from blipren.training.commands.convert import ConvertSettings
from blipren.training.commands.import_ import ImportSettings
from blipren.training.errors import UserError
from blipren.training.files import complete_or_absent_folder
from blipren.training.hub.import_blip2 import from_blip2


def convert(settings: ConvertSettings) -> None:
    """Writes `settings.model` as a checkpoint of the other kind, or of the wanted one."""
    print(f"convert: {settings.model} -> {settings.out} ({settings.to} checkpoint)")
    convert_folder(settings.model, Path(settings.out), settings.to)
    print(f"the {settings.to} checkpoint is in {settings.out}")


def convert_folder(model_path: str | Path, out: Path, kind: str) -> None:
    """Loads a checkpoint (folder or Hub id), saves it as `kind` ("full" or "bridge"), and compares all weights.

    Raises:
        UserError: when it does not load, knows no base models, or a bridge would lose weights that were trained.
    """
    model, processor = _load(model_path)
    with complete_or_absent_folder(out) as folder:
        try:
            model.save_pretrained(folder) if kind == "full" else model.save_bridge(folder)
        except ValueError as error:
            raise UserError(f"{model_path} cannot be a {kind} checkpoint: {error}") from error
        processor.save_pretrained(folder)
        again, _ = _load(folder)
        weights, loaded = model.state_dict(), again.state_dict()
        for name, value in weights.items():
            if name not in loaded or not torch.equal(value, loaded[name].to(value.dtype)):
                raise UserError(
                    f"{model_path} cannot be a {kind} checkpoint: its {name} is not that of its base model, so it was "
                    "trained and would be lost"
                )


def _load(path: str | Path):
    try:
        return AutoModel.from_pretrained(path), BliprenProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not load: {' '.join(str(error).split())[:600]}") from error


def import_model(settings: ImportSettings) -> None:
    """Writes a transformers BLIP-2 or InstructBLIP model (folder or Hub id) as a full checkpoint of ours."""
    print(f"import: {settings.source} -> {settings.out}")
    with complete_or_absent_folder(Path(settings.out)) as folder:
        model, processor = from_blip2(settings.source)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"the full checkpoint is in {settings.out}; try: blipren caption {settings.out} IMAGE")
