"""Paths of this machine in files that are about to be published: removed where nothing reads them, found elsewhere."""

import json
import re
from pathlib import Path

from blipren.training.checkpoint_config import is_local, local_bases

# what a path on somebody's machine looks like inside a text; "/resolve/main" in an address is not one
_LOCAL_PATH = re.compile(
    r"(?<![\w./:-])(?:/(?:home|root|Users|tmp|mnt|data|work|workspace|scratch|opt|var|srv|media|content|kaggle|private|nfs"
    r"|gpfs|lustre)/[\w.-]+|[A-Za-z]:\\\\?[\w.-]+|file://|~/[\w.-]+)"
)
# transformers writes the folder that something was loaded from here, and never reads it back
_SOURCE_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file", "vocab_file")


def remove_local_paths(name: str, content: bytes) -> bytes:
    """Return a JSON file without the folders that its parts were loaded from.

    Of `config.json` the names of the base models stay, without the folders that held them: only full checkpoints are
    published over local base models, and these do not read them.
    """
    data = json.loads(content)
    cleaned = _without_source_folders(data)
    if name == "config.json":
        for part, folder in local_bases(cleaned).items():
            cleaned["base_models"][part]["id"] = Path(folder).name
    return content if cleaned == data else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _without_source_folders(value):
    if isinstance(value, dict):
        return {
            k: _without_source_folders(v)
            for k, v in value.items()
            if not (k in _SOURCE_KEYS and isinstance(v, str) and (not v or is_local(v)))
        }
    return [_without_source_folders(v) for v in value] if isinstance(value, list) else value


def find_local_path(name: str, content: bytes) -> str | None:
    """Return the first thing in a text file that looks like a path of this machine. A vocabulary may hold any text."""
    name = name.removeprefix("qformer_tokenizer/")
    if name in ("vocab.json", "vocab.txt", "merges.txt"):
        return None
    text = content.decode("utf-8", errors="replace")
    if name == "tokenizer.json":
        data = json.loads(text)
        data.get("model", {}).pop("vocab", None)
        data.get("model", {}).pop("merges", None)
        data.pop("added_tokens", None)
        text = "\n".join(_strings(data))
    match = _LOCAL_PATH.search(text) or re.search(re.escape(str(Path.home())) + r"/[\w.-]+", text)
    return match.group(0) if match else None


def _strings(value):
    """Yield every string of a JSON value, keys included."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value
