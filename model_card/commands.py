"""The commands that make a model like the one of a card."""

import shlex
from dataclasses import MISSING, fields

import yaml

from blipren.training.checkpoint_config import is_local
from blipren.training.commands.train import TrainSettings

# what says where a run was, not what it was
LEFT_OUT = ("model", "cache", "out", "device", "workers", "log_every", "report_to", "push_to", "public", "resume")

QFORMER_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "cross_attention_frequency",
)
PIECES = {"vision_scales": "scales", "vision_join": "scale-join", "vision_tiles": "tiles", "num_frames": "frames"}


def training_commands(config: dict, settings: dict, dataset: str | None) -> list[str]:
    """Return `new`, `embed` and `train` with the settings that are not the defaults; [] for a run of another stage.

    Args:
        config: of the checkpoint. settings: of its run, paths without folders. dataset: what it was evaluated on.
    """
    known = {field.name: field for field in fields(TrainSettings)}
    if not settings or not settings.keys() <= known.keys():
        return []
    bases = config.get("base_models") or {}
    vision = " ".join(_base(bases, part) for part in ("vision", "second_vision") if part in bases)
    new = f"blipren new my-vlm --vision {vision} --llm {_base(bases, 'llm')} --connector {config.get('connector')}"
    new += f" --projector {config.get('projector')}"
    qformer = config.get("qformer_config") or {}
    if queries := qformer.get("num_query_tokens"):
        sizes = {name: qformer[name] for name in QFORMER_SIZES if name in qformer}
        if (scale := qformer.get("time_embedding_scale", 1.0)) != 1.0:
            sizes["time_embedding_scale"] = scale
        new += f" --queries {queries} --qformer {shlex.quote(_as_yaml(sizes))}"
    for name, flag in PIECES.items():
        if (value := config.get(name)) not in (None, [1], "channels"):
            new += f" --{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"
    if config.get("frame_tokens"):
        new += " --frame-tokens"
    if (time := qformer.get("time_embedding")) not in (None, "sinusoidal"):
        new += f" --time-embedding {time}"
    train = ["blipren train my-vlm cache run"]
    for name, value in settings.items():
        field = known[name]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if name in LEFT_OUT or value in (default, "") or (default == [] and value == ""):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            train.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            train.append(f"--{flag} {shlex.quote(_as_yaml(value))}")
        else:  # lists are one text here, with commas
            train.append(f"--{flag} {shlex.join(str(value).split(', '))}")
    return [new, f"blipren embed my-vlm {dataset or 'photos'} cache", " ".join(train)]


def _as_yaml(values: dict) -> str:
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=10_000).strip()


def _base(bases: dict, part: str) -> str:
    """Return the id of a base model; of a local folder only its name."""
    name = (bases.get(part) or {}).get("id") or part.upper()
    return name.rstrip("/").split("/")[-1] if is_local(name) else name
