"""What is installed: every folder of code, and for running no more than running needs."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_of_code_is_a_package():
    folders = [path.parent for room in ("training", "model_card") for path in (ROOT / room).rglob("__init__.py")]
    names = ["blipren", *(".".join(["blipren", *folder.relative_to(ROOT).parts]) for folder in folders)]
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(names)


def test_running_needs_none_of_the_extras():
    needed = " ".join(PROJECT["project"]["dependencies"])
    for name in ("ray", "deepspeed", "bitsandbytes", "trl", "pytest", "mkdocs"):
        assert name not in needed
