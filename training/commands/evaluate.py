"""Measure a model on held-out data: metrics, predictions and a report."""

from dataclasses import dataclass, field
from pathlib import Path

from blipren.training.arguments import check_checkpoint, check_dataset, check_files
from blipren.training.data.sources.grounding import KINDS
from blipren.training.data.sources.settings import GroundingSettings
from blipren.training.errors import UsageError
from blipren.training.evaluation.settings import GenerationSettings
from blipren.training.settings import Settings, choice, positional

EVALUATION_TASKS = ("captioning", "vqa", "choice", "retrieval", "pope", "refer")


@dataclass(kw_only=True)
class MetricSettings(Settings):
    """Metrics."""

    tokenizer: str = choice("auto", "java", "python", "whitespace", default="auto")
    """Tokenizer of the caption metrics; auto is Stanford's through Java, or its equal in Python where there is no Java."""
    meteor: bool = True
    """Compute METEOR, if there is Java."""
    similarity: bool = True
    """Compute CLIPScore or SigLIPScore, if the vision encoder has a text tower."""
    probe: bool = True
    """Measure whether the model uses its image: losses and scores with another image, a black one and none."""
    rerank: int = 0
    """Retrieval: number of candidates that the matching head re-orders; 0 for none."""
    resamples: int = 1000
    """Number of bootstrap samples for the confidence intervals."""


@dataclass(kw_only=True)
class ReportSettings(Settings):
    """Report."""

    report: bool = True
    """Write report.html."""
    report_images: int = 60
    """Number of images in the report's grid: the best, the worst and some between."""
    attention_images: int = 6
    """Number of images in the report's attention explorer."""
    run: str | None = None
    """Run folder whose training curves the report shows; by default the checkpoint's own."""


@dataclass(kw_only=True)
class EvaluateSettings(ReportSettings, MetricSettings, GenerationSettings, GroundingSettings):
    """`blipren evaluate`: metrics, predictions and a report on a held-out split. The same command resumes a stopped run."""

    model: str = positional()
    """Checkpoint folder or Hub id; - with --predictions, which needs no model."""
    dataset: str = positional()
    """Anything that datasets.load_dataset reads."""
    out: str = positional()
    """Folder for metrics.json, predictions.jsonl, predictions.csv and report.html."""
    tasks: list[str] = field(default_factory=lambda: ["captioning"])
    """What to evaluate: captioning, vqa (the data set's questions, and those of conversations, each in its context), choice
    (questions with choices, by likelihood and by generation), retrieval (an aligned checkpoint), pope (yes/no
    questions about annotated objects), refer (boxes and points; --grounding chooses the questions, by default all)."""
    split: str | None = None
    """Split to evaluate on: train, validation or test; by default test, or validation if there is no test split."""
    limit: int | None = None
    """Use only this many images, the first of the split; by default all."""
    predictions: str | None = None
    """Score these captions instead of generating any: JSON lines with id and caption, or one JSON object."""
    before: str | None = None
    """An earlier checkpoint, or its evaluation folder: the report shows its captions and scores for comparison."""
    memory: bool = True
    """Use the model's memory for captions, if it has one; near duplicates of an image are left out of it."""
    reranker: bool = True
    """Use the model's reranker for captions, if it has one and no memory is used."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Device to compute on."""
    seed: int = 0
    """Seed of the exchanged images, of POPE's objects and of the bootstrap."""

    def __post_init__(self):
        super().__post_init__()
        unknown = [task for task in self.tasks if task not in EVALUATION_TASKS]
        if unknown or not self.tasks:
            raise UsageError(f"tasks are {self.tasks}; each must be one of {', '.join(EVALUATION_TASKS)}")
        if "refer" in self.tasks:
            self.grounding = self.grounding or list(KINDS)
        elif self.grounding:
            raise UsageError("grounding chooses the questions of --tasks refer: add that task, or leave grounding out")
        if self.resamples < 1:
            raise UsageError(f"resamples is {self.resamples}; it must be at least 1")
        if self.predictions is not None and self.tasks != ["captioning"]:
            raise UsageError("predictions are captions: they go with --tasks captioning alone")
        if self.before is not None and "captioning" not in self.tasks:
            raise UsageError("before compares captions: it goes with --tasks captioning")
        if self.predictions is None and self.model == "-":
            raise UsageError("a model is needed, unless captions are given by --predictions")


def run(settings: EvaluateSettings) -> int | None:
    """Run the command. Returns the exit status."""
    if settings.predictions is None:
        check_checkpoint(settings.model)
    else:
        check_files(settings.predictions)
    check_dataset(settings.dataset)
    if settings.before is not None and not (Path(settings.before) / "metrics.json").is_file():
        check_checkpoint(settings.before)

    from blipren.training.evaluation.evaluate import evaluate

    return evaluate(settings)
