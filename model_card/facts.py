"""What a card says, read from the files that a run leaves behind. Nothing is invented: what is not there is left out."""

import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from blipren.training.errors import UserError
from blipren.training.hub.package import is_local

# from the freest to the strictest; what is not listed counts as "other": somebody has to read it
STRICTNESS = (
    (
        "cc0-1.0",
        "unlicense",
        "mit",
        "mit-0",
        "apache-2.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "isc",
        "cc-by-4.0",
        "cc-by-3.0",
    ),
    ("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bigcode-openrail-m"),
    ("mpl-2.0", "lgpl-3.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-2.0", "gpl-3.0", "agpl-3.0"),
    (
        "gemma",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "dinov3-license",
        "falcon-llm-license",
    ),
    ("other",),
    ("cc-by-nd-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "apple-amlr"),
    ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
)


@dataclass(frozen=True)
class CardSources:
    """Where a card's facts are.

    model: checkpoint folder; run: run folder of `train` or `align` (settings.yaml, log.jsonl, curves, environment);
    evaluation: folder of `evaluate`; cache: feature cache; pictures: whether pictures may be published;
    license: of the published weights, when the strictest of the parts is not it; base_licenses: by part.
    """

    model: Path
    run: Path | None = None
    evaluation: Path | None = None
    cache: Path | None = None
    pictures: bool = True
    license: str | None = None
    base_licenses: dict[str, str | None] = field(default_factory=dict)
    tag: str | None = None


def read_json(path: Path | None) -> dict:
    """A JSON file, {} where there is none; one clear error where it is damaged."""
    if path is None or not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def strictness(license_name: str) -> int:
    for rank, names in enumerate(STRICTNESS):
        if license_name in names:
            return rank
    return next(rank for rank, names in enumerate(STRICTNESS) if "other" in names)


def license_of(base_id: str, revision: str | None = None) -> str | None:
    """The licence that a base model's own card states: in its folder, or on the Hub. None where none is found."""
    if is_local(base_id):
        card = Path(base_id) / "README.md"
        return ModelCard.load(card).data.get("license") if card.is_file() else None
    try:
        data = HfApi().model_info(base_id, revision=revision).card_data
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return None
    return data.get("license") if data else None


def count_parameters(folder: Path) -> dict[str, int]:
    """Stored numbers by part of the model, from the safetensors headers alone."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            part = _part_of(name)
            size = 1
            for extent in entry["shape"]:
                size *= extent
            counts[part] = counts.get(part, 0) + size
    return counts


def _part_of(name: str) -> str:
    for part, pattern in (
        ("vision", r"(^|\.)vision_tower\."),
        ("qformer", r"(^|\.)qformer\."),
        ("projector", r"(^|\.)projector\."),
    ):
        if re.search(pattern, name):
            return part
    return "llm"


def human_count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def run_settings(run: Path | None) -> dict:
    """settings.yaml of a run, flattened to one level; paths are cut to their last part."""
    path = run / "settings.yaml" if run else None
    if path is None or not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and len(settings) == 1:
            flat.update(value)
        else:
            flat[key] = value
    return {key: private(value) for key, value in flat.items() if value is not None}


def private(value: object) -> object:
    """A setting's value as it may be published: of a path only its last part stays."""
    if isinstance(value, list):
        return ", ".join(str(private(v)) for v in value)
    if isinstance(value, str):
        return ",".join(_last_part(piece) for piece in value.split(","))
    return value


def _last_part(text: str) -> str:
    path, equals, weight = text.partition("=")
    if "/" not in path or not is_local(path):
        return text
    return Path(path).name + equals + weight


def log_summary(run: Path | None) -> dict:
    """Last step, best validation loss and seconds of a run's log.jsonl."""
    path = run / "log.jsonl" if run else None
    if path is None or not path.is_file():
        return {}
    summary: dict = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {path} is not JSON: {error}") from error
        summary["steps"] = max(summary.get("steps", 0), row.get("step", 0))
        if row.get("kind") == "validation" and row.get("loss", float("inf")) < summary.get(
            "validation_loss", float("inf")
        ):
            summary |= {"validation_loss": row["loss"], "best_step": row["step"]}
        summary["seconds"] = max(summary.get("seconds", 0), row.get("seconds", 0))
    return summary
