"""Import a model that other code trained: BLIP-2, InstructBLIP, or weights of the BLIPren notebooks and tutorials."""

from dataclasses import dataclass, field
from pathlib import Path

from blipren.training.arguments import check_base_model
from blipren.training.errors import UsageError, UserError
from blipren.training.files import check_new_folder, complete_or_absent_folder
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class WeightsSettings(Settings):
    """Weights of the notebooks and tutorials (formats blipren, two-stage, minimal)."""

    vision: str | None = None
    """Vision encoder that the weights were trained with: Hub id or folder, optionally with @revision."""
    llm: str | None = None
    """Language model that the weights were trained with: Hub id or folder, optionally with @revision."""
    prompts: list[str] = field(default_factory=list)
    """Caption prompts that the weights were trained with; by default those of the format's own code."""
    heads: int | None = None
    """Attention heads of the Q-Former; by default as many as in the format's own code."""


@dataclass(kw_only=True)
class ImportSettings(WeightsSettings):
    """`blipren import`: a model that other code trained, as a full checkpoint."""

    source: str = positional()
    """Model to import. blip-2: folder or Hub id, optionally with @revision, such as Salesforce/blip2-opt-2.7b. Other
    formats: the file (.pt, .pth, .bin, .safetensors) or folder that their code saves."""
    out: str = positional()
    """Folder for the checkpoint."""
    format: str = choice("blip-2", "blipren", "two-stage", "minimal", default="blip-2")
    """What SOURCE is: a BLIP-2 or InstructBLIP model of transformers; weights of the BLIPren notebooks (normal or mixture
    of experts); of the two-stage tutorial; of the minimal notebook."""

    def __post_init__(self):
        super().__post_init__()
        if self.format == "blip-2":
            for name in ("vision", "llm", "prompts", "heads"):
                if getattr(self, name):
                    raise UsageError(f"--{name} is of the formats blipren, two-stage and minimal, not of blip-2")
        elif self.vision is None or self.llm is None:
            raise UsageError(f"--format {self.format} needs --vision and --llm: its files hold neither")


def run(settings: ImportSettings) -> None:
    """Write the imported model as a full checkpoint; OUT is complete or absent."""
    check_new_folder(Path(settings.out))
    if settings.format != "blip-2" and not Path(settings.source).exists():
        raise UserError(f"there is no file or folder {settings.source}")
    for name in [settings.source] if settings.format == "blip-2" else [settings.vision, settings.llm]:
        check_base_model(name)
    print(f"import: {settings.source} ({settings.format}) -> {settings.out}")

    if settings.format == "blip-2":
        from blipren.training.hub.import_blip2 import import_blip2

        model, processor = import_blip2(settings.source)
    else:
        from blipren.training.hub.import_weights import import_weights

        model, processor = import_weights(settings)
    with complete_or_absent_folder(Path(settings.out)) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"the full checkpoint is in {settings.out}; try: blipren caption {settings.out} IMAGE")
