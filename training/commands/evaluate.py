"""Measure a model on held-out data: metrics, predictions and a report."""

from dataclasses import dataclass, field

from blipren.training.data.sources.settings import SourceSettings
from blipren.training.errors import UsageError
from blipren.training.settings import choice, positional

EVALUATION_TASKS = ("captioning", "vqa", "retrieval", "pope")


@dataclass(kw_only=True)
class EvaluateSettings(SourceSettings):
    """`blipren evaluate`: metrics, predictions and a report on a held-out split. Run again, it goes on where it stopped."""

    model: str = positional()
    """Checkpoint folder or Hub id; - with --predictions, which needs no model."""
    dataset: str = positional()
    """Anything that datasets.load_dataset reads."""
    out: str = positional()
    """Folder for metrics.json, predictions.jsonl, predictions.csv and report.html."""
    tasks: list[str] = field(default_factory=lambda: ["captioning"])
    """What to evaluate: captioning, vqa (the data set's questions), retrieval (an aligned checkpoint), pope (yes/no
    questions about annotated objects)."""
    split: str | None = None
    """Split to evaluate on: train, validation or test; by default test, else validation."""
    limit: int | None = None
    """Only the first so many images of the split; all of them by default."""
    predictions: str | None = None
    """Score these captions instead of generating any: JSON lines with id and caption, or one JSON object."""
    before: str | None = None
    """An untrained or earlier checkpoint, or its evaluation folder: its captions stand beside in the report."""
    prompt: str | None = None
    """Caption prompt; by default the model's own."""
    max_new_tokens: int = 64
    """Longest answer; what is cut off there is counted."""
    num_beams: int = 1
    """Beams; 1 is greedy."""
    length_penalty: float = 1.0
    """Above 1 beams prefer longer answers."""
    no_repeat_ngram_size: int = 0
    """Length of a word sequence that no answer may repeat; 0 allows all."""
    batch_size: int = 32
    """Answers that are generated together."""
    rerank: int = 0
    """Retrieval: candidates that the matching head re-orders; 0 for none."""
    probe: bool = True
    """Measure whether the model looks at its image: losses and scores with another image, a black one and none."""

    tokenizer: str = choice("auto", "java", "python", "whitespace", default="auto")
    """Tokenizer of the metrics; auto is Stanford's through Java, or without Java its equal in Python."""
    meteor: bool = True
    """Compute METEOR, where there is Java."""
    similarity: bool = True
    """Compute CLIPScore or SigLIPScore, where the vision encoder has a text tower."""
    resamples: int = 1000
    """Draws of the bootstrap that confidence intervals come from."""
    report: bool = True
    """Write report.html."""
    report_images: int = 60
    """Photos in the report's grid: the best, the worst and some between."""
    attention_images: int = 6
    """Photos in the report's attention explorer."""
    run: str | None = None
    """Run folder whose training curves the report shows; by default the checkpoint's own."""
    device: str = choice("auto", "cpu", "cuda", "mps", default="auto")
    """Where to compute."""
    seed: int = 0
    """Seed of other images, POPE's objects and the bootstrap."""

    def __post_init__(self):
        super().__post_init__()
        unknown = [task for task in self.tasks if task not in EVALUATION_TASKS]
        if unknown or not self.tasks:
            raise UsageError(f"tasks are {self.tasks}; each must be one of {', '.join(EVALUATION_TASKS)}")
        for name in ("batch_size", "max_new_tokens", "num_beams", "resamples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.predictions is not None and self.tasks != ["captioning"]:
            raise UsageError("predictions are captions: they go with --tasks captioning alone")
        if self.before is not None and "captioning" not in self.tasks:
            raise UsageError("before compares captions: it goes with --tasks captioning")
        if self.predictions is None and self.model == "-":
            raise UsageError("a model is needed, unless captions are given by --predictions")


def run(settings: EvaluateSettings) -> int | None:
    """Run the command. Returns the exit status."""
    from blipren.training.evaluation.evaluate import evaluate

    return evaluate(settings)
