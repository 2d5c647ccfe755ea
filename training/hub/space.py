"""The demo of a published model as a Space of the Hub."""

import ast
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path

import blipren
from blipren.training.hub.published_files import PublishedFile, check_no_local_path

PACKAGE = Path(blipren.__file__).parent
TEMPLATES = PACKAGE / "model_card" / "space"
# what the modules below import; Gradio comes with the Space, at the version that its card names
REQUIREMENTS = (
    "torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "accelerate", "peft", "pillow", "numpy",
    "matplotlib",
)  # fmt: skip


def space_files(model: str, revision: str, takes_videos: bool = False) -> list[PublishedFile]:
    """Return the files of a Space that shows a model of the Hub at a commit.

    They are the page's program, the modules of this package that it imports, example pictures with their licence,
    requirements pinned to the versions installed here (with PyAV for a model that takes videos), and the Space's card.
    """
    values = {"model": model, "name": model.split("/")[-1], "revision": revision}
    values["gradio"] = importlib.metadata.version("gradio")
    card = (TEMPLATES / "README.md").read_text()
    for name, value in values.items():
        card = card.replace(f"@@{name}@@", value)
    names = (*REQUIREMENTS, "av") if takes_videos else REQUIREMENTS
    pins = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}\n" for name in names]
    contents = {
        "README.md": card,
        "app.py": (TEMPLATES / "app.py").read_text(),
        "model.json": json.dumps({"model": model, "revision": revision}) + "\n",
        "requirements.txt": "".join(pins),
    }
    contents |= {f"blipren/{path}": (PACKAGE / path).read_text() for path in needed_modules()}
    files = [PublishedFile(name, content.encode()) for name, content in contents.items()]
    files += [PublishedFile(f"examples/{path.name}", path.read_bytes()) for path in (TEMPLATES / "examples").iterdir()]
    for file in files:
        check_no_local_path(file)
    return sorted(files, key=lambda file: file.name)


def needed_modules() -> list[str]:
    """Return the files of this package that `app.py` needs, relative to it: the model's, and what of training/ is imported."""
    shipped = [path.name for path in PACKAGE.glob("*_blipren.py")]
    found: set[str] = set()
    waiting = list(imports(TEMPLATES / "app.py"))
    while waiting:
        module = waiting.pop()
        path = PACKAGE.joinpath(*module.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        name = path.relative_to(PACKAGE).as_posix()
        if name not in found and path.is_file():
            found.add(name)
            waiting += [*imports(path), *([module.rpartition(".")[0]] if "." in module else [])]
    return sorted({*shipped, *found})


def imports(path: Path) -> Iterable[str]:
    """Yield the names of this package that a file imports from: modules, and names that may be modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "blipren":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
