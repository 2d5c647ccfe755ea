"""The metrics as `evaluate` modules: `evaluate.load(path)` and `evaluate.combine([path, ...])` take these files.

`evaluate` copies a module's file to another folder, so each imports from the installed package, one name an import. It
takes the first metric class of the file, so the base classes are imported with their module: `base.CaptionMetric`.
"""

from __future__ import annotations

from pathlib import Path

MODULES = ("cider", "caption_bleu", "rouge_l", "meteor_1_5", "caption_text", "vqa_accuracy")


def module_path(name: str) -> str:
    """Return the path of a metric module, for `evaluate.load`. Names: see `MODULES`."""
    if name not in MODULES:
        raise ValueError(f"no metric module {name!r}; there are {', '.join(MODULES)}")
    return str(Path(__file__).with_name(f"{name}.py"))
