"""Every setting of every command, as documented dataclasses. The docstring under a field is its `--help` text.

A recipe (YAML) has one section a command with these names as keys; flags override it.
"""

from dataclasses import dataclass

from blipren.training.settings.align import AlignSettings
from blipren.training.settings.base import Settings, field_docs
from blipren.training.settings.data import EmbedSettings
from blipren.training.settings.evaluation import (
    EVALUATION_TASKS,
    CaptionSettings,
    CompareSettings,
    EvaluateSettings,
)
from blipren.training.settings.model import ConvertSettings, DoctorSettings, ImportSettings, NewSettings
from blipren.training.settings.publish import PushSettings
from blipren.training.settings.quickstart import QuickstartSettings
from blipren.training.settings.train import TrainSettings

__all__ = [
    "COMMANDS",
    "EVALUATION_TASKS",
    "AlignSettings",
    "CaptionSettings",
    "Command",
    "CompareSettings",
    "ConvertSettings",
    "DoctorSettings",
    "EmbedSettings",
    "EvaluateSettings",
    "ImportSettings",
    "NewSettings",
    "PushSettings",
    "QuickstartSettings",
    "Settings",
    "TrainSettings",
    "field_docs",
]


@dataclass(frozen=True)
class Command:
    """A sub-command: its settings, the function that runs it (imported when called), its help line."""

    settings: type[Settings]
    function: str
    help: str


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        QuickstartSettings,
        "blipren.training.quickstart.run.quickstart",
        "build, train, judge and use a small model without network or data",
    ),
    "new": Command(
        NewSettings, "blipren.training.assemble.new", "join a vision encoder and an LLM into an untrained checkpoint"
    ),
    "doctor": Command(
        DoctorSettings, "blipren.training.doctor.doctor", "prove that a checkpoint's parts work together"
    ),
    "embed": Command(EmbedSettings, "blipren.training.data.embed.embed", "embed a dataset once into a feature cache"),
    "align": Command(
        AlignSettings, "blipren.training.align.align", "stage 1: train the Q-Former with ITC, ITM and ITG"
    ),
    "train": Command(
        TrainSettings, "blipren.training.caption.train", "stage 2: train the bridge to caption through the LLM"
    ),
    "evaluate": Command(
        EvaluateSettings, "blipren.training.evaluation.evaluate.evaluate", "metrics, predictions and a report"
    ),
    "compare": Command(
        CompareSettings, "blipren.training.evaluation.compare.compare", "compare two evaluations, paired"
    ),
    "caption": Command(CaptionSettings, "blipren.training.evaluation.captioning.caption", "caption images"),
    "convert": Command(ConvertSettings, "blipren.training.convert.convert", "bridge checkpoint <-> full checkpoint"),
    "import": Command(
        ImportSettings,
        "blipren.training.convert.import_model",
        "a BLIP-2 or InstructBLIP model as a checkpoint of ours",
    ),
    "push": Command(PushSettings, "blipren.training.publish.push", "publish a checkpoint on the Hub"),
}
