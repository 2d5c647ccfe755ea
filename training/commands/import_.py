"""Import a BLIP-2 or InstructBLIP model as a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from blipren.training.arguments import check_base_model
from blipren.training.files import check_new_folder, complete_or_absent_folder
from blipren.training.settings import Settings, positional


@dataclass(kw_only=True)
class ImportSettings(Settings):
    """`blipren import`: a BLIP-2 or InstructBLIP model of transformers as a full checkpoint."""

    source: str = positional()
    """Folder or Hub id, optionally with @revision, such as Salesforce/blip2-opt-2.7b."""
    out: str = positional()
    """Folder for the checkpoint."""


def run(settings: ImportSettings) -> None:
    """Write the imported model as a full checkpoint; OUT is complete or absent."""
    check_base_model(settings.source)
    check_new_folder(Path(settings.out))

    from blipren.training.hub.import_blip2 import import_blip2

    print(f"import: {settings.source} -> {settings.out}")
    model, processor = import_blip2(settings.source)
    with complete_or_absent_folder(Path(settings.out)) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"the full checkpoint is in {settings.out}; try: blipren caption {settings.out} IMAGE")
