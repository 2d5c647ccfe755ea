"""What `config.json` of a checkpoint says, read without torch."""

import json
import os
import re
from pathlib import Path

from blipren.training.errors import UserError


def is_local(model_id: str) -> bool:
    """Return whether a model's id names a folder of this machine, and not a Hub repository."""
    hub_shape = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id)
    return not hub_shape or model_id.startswith((".", "~")) or os.path.isdir(model_id)


def read_config(folder: Path) -> dict:
    """Return `config.json` of a BLIPren checkpoint folder.

    Raises:
        UserError: the folder has none, it is not JSON, or it belongs to another kind of model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no config.json; make one with `blipren new`")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): the checkpoint is damaged") from error
    check_model_type(str(folder), config)
    return config


def check_model_type(name: str, config: dict) -> None:
    """Raise `UserError` if the config of the model `name` is not one of BLIPren."""
    if config.get("model_type") != "blipren":
        raise UserError(
            f"{name} is not a BLIPren checkpoint: its config.json has model_type {config.get('model_type')!r}; make one "
            "with `blipren new`"
        )


def local_bases(config: dict) -> dict[str, str]:
    """Return the base models (`vision`, `llm`) of a checkpoint that are folders of this machine, with the folder."""
    bases = config.get("base_models") or {}
    return {part: base["id"] for part, base in bases.items() if base and is_local(str(base.get("id")))}


def missing_bases(config) -> list[str]:
    """Return the folders of base models that are not here, so that a bridge checkpoint on them would not load.

    Args:
        config: a `BliprenConfig`, as of a full checkpoint that came from another machine.
    """
    return [
        folder for folder in local_bases({"base_models": config.base_models}).values() if not os.path.isdir(folder)
    ]
