"""The facts of a model card, read from the files that a run leaves. What is not there is left out of the card."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import safe_open

from blipren.training.checkpoint_config import is_local
from blipren.training.errors import UserError

# from the freest to the strictest; what is not listed counts as "other": somebody has to read it
STRICTNESS = (
    ("cc0-1.0", "unlicense", "mit", "mit-0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "cc-by-4.0", "cc-by-3.0"),
    ("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bigcode-openrail-m"),
    ("mpl-2.0", "lgpl-3.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-2.0", "gpl-3.0", "agpl-3.0"),
    ("gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "dinov3-license", "falcon-llm-license"),
    ("other",),
    ("cc-by-nd-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "apple-amlr"),
    ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
)  # fmt: skip


@dataclass(frozen=True)
class CardSources:
    """Where a card's facts are.

    model: checkpoint folder; run: run folder of `train` or `align` (settings.yaml, log.jsonl, curves, environment);
    evaluation: folder of `evaluate`; cache: feature cache; pictures: whether pictures may be published;
    license: of the published weights, where it is not the strictest of the parts; base_licenses: by part; space: whether
    the demo is published as a Space of the same name.
    """

    model: Path
    run: Path | None = None
    evaluation: Path | None = None
    cache: Path | None = None
    pictures: bool = True
    license: str | None = None
    base_licenses: dict[str, str | None] = field(default_factory=dict)
    tag: str | None = None
    space: bool = False


def read_json(path: Path | None) -> dict:
    """Return a JSON file's content, {} where there is no file. Raises `UserError` where it is damaged."""
    if path is None or not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def strictness(license_name: str) -> int:
    """Return the rank of a licence: the higher, the stricter. An unknown one ranks as "other"."""
    for rank, names in enumerate(STRICTNESS):
        if license_name in names:
            return rank
    return STRICTNESS.index(("other",))


def find_license(base_id: str, revision: str | None = None) -> str | None:
    """Return the licence in a base model's own card, in its folder or on the Hub. None where none is found."""
    if is_local(base_id):
        card = Path(base_id) / "README.md"
        return ModelCard.load(card).data.get("license") if card.is_file() else None
    try:
        data = HfApi().model_info(base_id, revision=revision).card_data
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return None
    return data.get("license") if data else None


def count_parameters(folder: Path) -> dict[str, int]:
    """Return the number of stored parameters by part of the model, read from the safetensors headers."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():
                part = _part_of(name)
                counts[part] = counts.get(part, 0) + math.prod(file.get_slice(name).get_shape())
    return counts


def _part_of(name: str) -> str:
    """Return the part that a weight belongs to. All that is trained from nothing counts as the connector."""
    names = {
        "vision_tower": "vision",
        "second_vision_tower": "second_vision",
        "language_model": "llm",
        "lm_head": "llm",
    }
    return next((part for module, part in names.items() if module in name.split(".")), "connector")


def human_count(number: int) -> str:
    """Return a number as a reader wants it: 135.1M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def run_settings(run: Path | None) -> dict:
    """Return settings.yaml of a run without empty settings. Of paths only the last part stays."""
    path = run / "settings.yaml" if run else None
    if path is None or not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return {key: without_folders(value) for key, value in settings.items() if value is not None}


def without_folders(value: object) -> object:
    """Return a setting's value as it may be published: of a path only its last part."""
    if isinstance(value, list):
        return ", ".join(str(without_folders(v)) for v in value)
    if isinstance(value, str):
        return ",".join(_last_part(piece) for piece in value.split(","))
    return value


def _last_part(text: str) -> str:
    path, equals, weight = text.partition("=")
    if "/" not in path or not is_local(path):
        return text
    return Path(path).name + equals + weight


def log_summary(run: Path | None) -> dict:
    """Return steps, seconds, and best validation loss with its step, from a run's log.jsonl."""
    path = run / "log.jsonl" if run else None
    if path is None or not path.is_file():
        return {}
    summary: dict = {}
    best = float("inf")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {path} is not JSON: {error}") from error
        summary["steps"] = max(summary.get("steps", 0), row.get("step", 0))
        summary["seconds"] = max(summary.get("seconds", 0), row.get("seconds", 0))
        if row.get("kind") == "validation" and row.get("loss", best) < best:
            best = row["loss"]
            summary |= {"validation_loss": best, "best_step": row["step"]}
    return summary
