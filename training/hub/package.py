"""What of a checkpoint folder may be published: which files, and that nothing in them tells of the machine they are from.

Only what is named here leaves the house: safetensors, the model's code, the processor, the generation config, the card
and its pictures. Everything else in a run folder (optimizer states, logs, pickles) stays.
"""

import fnmatch
import hashlib
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from blipren.training.errors import UserError

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
BRIDGE = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "qformer_tokenizer/*.json",
    "qformer_tokenizer/vocab.txt",
)
SETTINGS = ("config.json", "generation_config.json")
CODE = ("*_blipren.py",)
CARD = ("README.md", "pictures/*.png", "pictures/*.jpg", ".eval_results/*.yaml")
PUBLISHED = WEIGHTS + BRIDGE + PROCESSOR + SETTINGS + CODE + CARD

# what a path on somebody's machine looks like inside a text; "/resolve/main" in an address is none
_LOCAL_PATH = re.compile(
    r"""(?<![\w./:-])(?:/(?:home|root|Users|tmp|mnt|data|work|workspace|scratch|opt|var|srv|media|content|kaggle|private|nfs|gpfs|lustre)/[\w.-]+"""
    r"""|[A-Za-z]:\\\\?[\w.-]+|file://|~/[\w.-]+)"""
)
# transformers writes the folder that something was loaded from here; nothing reads it back
_PROVENANCE_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file", "vocab_file")


@dataclass(frozen=True)
class PlannedFile:
    """A file that will be published: its name there, and its content (small) or the path that holds it."""

    name: str
    source: Path | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def sha256(self) -> str:
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        digest = hashlib.sha256()
        with open(self.source, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def git_sha1(self) -> str:
        """Git's name of the content, which the Hub gives for files outside of LFS."""
        digest = hashlib.sha1(b"blob %d\0" % self.size)
        if isinstance(self.source, bytes):
            digest.update(self.source)
        else:
            with open(self.source, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()


def is_published(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in PUBLISHED)


def is_local(base_id: str) -> bool:
    """Whether a base model's id names a folder rather than a Hub repository."""
    hub_shape = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_id)
    return not hub_shape or base_id.startswith((".", "~")) or os.path.isdir(base_id)


def read_config(folder: Path) -> dict:
    """config.json of a checkpoint of ours, or one clear error."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no checkpoint: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): the checkpoint is damaged") from error
    if config.get("model_type") != "blipren":
        raise UserError(f"{folder} holds a model of type {config.get('model_type')!r}, not a BLIPren checkpoint")
    return config


def local_bases(config: dict) -> dict[str, str]:
    """Frozen parts (`vision`, `llm`) that came from a folder of this machine, with that folder."""
    bases = config.get("base_models") or {}
    return {part: base["id"] for part, base in bases.items() if base and is_local(str(base.get("id")))}


def check_safetensors(path: Path) -> dict:
    """Header of a safetensors file; raises `UserError` when the file is not one, or is truncated."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, 100 << 20):
            raise UserError(f"{path} is not a safetensors file: its header does not fit")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} is not a safetensors file: its header is not JSON") from error
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise UserError(
            f"{path} has {size} bytes where its header says {8 + length + end}: it is damaged or truncated"
        )
    return header


def _without_provenance(value):
    """The same JSON without the folders that transformers noted for itself."""
    if isinstance(value, dict):
        return {
            k: _without_provenance(v)
            for k, v in value.items()
            if not (k in _PROVENANCE_KEYS and isinstance(v, str) and (not v or is_local(v)))
        }
    return [_without_provenance(v) for v in value] if isinstance(value, list) else value


def _clean_json(name: str, content: bytes) -> bytes:
    data = json.loads(content)
    cleaned = _without_provenance(data)
    if name == "config.json":
        for part, folder in local_bases(cleaned).items():
            # a full checkpoint needs its bases no more: their names stay, the folders that held them do not
            cleaned["base_models"][part]["id"] = Path(folder).name
    return content if cleaned == data else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _strings(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value


def find_local_path(name: str, content: bytes) -> str | None:
    """The first thing in a text file that looks like a path of this machine."""
    text = content.decode("utf-8", errors="replace")
    if name == "tokenizer.json":  # a vocabulary may hold any text: only what surrounds it can tell of this machine
        data = json.loads(text)
        data.get("model", {}).pop("vocab", None)
        data.get("model", {}).pop("merges", None)
        data.pop("added_tokens", None)
        text = "\n".join(_strings(data))
    elif name in ("vocab.json", "vocab.txt", "merges.txt", "qformer_tokenizer/vocab.txt"):
        return None
    elif name == "qformer_tokenizer/tokenizer.json":
        return find_local_path("tokenizer.json", content)
    match = _LOCAL_PATH.search(text) or re.search(re.escape(str(Path.home())) + r"/[\w.-]+", text)
    return match.group(0) if match else None


def collect(folder: Path, config: dict) -> list[PlannedFile]:
    """The files of a checkpoint folder that are published, checked and cleaned; sorted by name.

    Raises:
        UserError: for missing code, weights or processor, damaged safetensors, or a local path that is left.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    planned = []
    for name in names:
        if not is_published(name) or name in ("README.md",) or name.startswith((".eval_results/", "pictures/")):
            continue
        path = folder / name
        if name.endswith(".safetensors"):
            header = check_safetensors(path)
            where = find_local_path(name, json.dumps(header.get("__metadata__", {})).encode())
            if where:
                raise UserError(f"the metadata of {path} holds the local path {where}: save it anew without")
            planned.append(PlannedFile(name, path))
        elif name.endswith((".json", ".jinja", ".py", ".txt", ".yaml")):
            content = path.read_bytes()
            planned.append(PlannedFile(name, _clean_json(name, content) if name.endswith(".json") else content))
        else:
            planned.append(PlannedFile(name, path))
    check_complete(folder, config, {file.name for file in planned})
    for file in planned:
        check_private(file)
    return planned


def check_private(file: PlannedFile) -> None:
    """Raises `UserError` when a text that is about to be published holds a path of this machine."""
    if isinstance(file.source, bytes) and not file.name.endswith((".png", ".jpg")):
        where = find_local_path(file.name, file.source)
        if where:
            raise UserError(f"{file.name} holds the local path {where!r}, which would be published: remove it")


def check_complete(folder: Path, config: dict, names: set[str]) -> None:
    """Raises `UserError` when weights, code or processor files that others need for loading are not there."""
    if "model.safetensors.index.json" in names:
        shards = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
        missing = sorted(shards - names)
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, which model.safetensors.index.json names")
    elif "model.safetensors" not in names:
        raise UserError(f"{folder} has no model.safetensors: only safetensors are published")
    code = {target.split("--")[-1].split(".")[0] + ".py" for target in _targets(config.get("auto_map") or {})}
    if not code:
        raise UserError(
            f"config.json in {folder} has no auto_map: others could not load it. Save it with save_pretrained"
        )
    imported, waiting = set(), list(code)
    while waiting:
        name = waiting.pop()
        if name in imported:
            continue
        imported.add(name)
        if name not in names:
            raise UserError(f"{folder} lacks {name}, the code that its auto_map names. Save it with save_pretrained")
        source = (folder / name).read_text()
        waiting += [f"{module}.py" for module in re.findall(r"^\s*from \.(\w+) import", source, flags=re.MULTILINE)]
    if "processor_config.json" not in names or not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise UserError(f"{folder} has no processor: save the processor beside the model with save_pretrained")


def _targets(auto_map: dict):
    for target in auto_map.values():
        yield from (t for t in (target if isinstance(target, list) else [target]) if t)
