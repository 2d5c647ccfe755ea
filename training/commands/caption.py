"""Caption images or a whole data set, or answer questions about them."""

from dataclasses import dataclass, field
from pathlib import Path

from blipren.training.arguments import check_checkpoint, check_dataset, check_files, is_dataset
from blipren.training.captioning.filter_rules import FILTER_RULES
from blipren.training.data.sources.settings import SourceSettings
from blipren.training.errors import UsageError, UserError
from blipren.training.evaluation.settings import GenerationSettings, SamplingSettings
from blipren.training.settings import Settings, choice, positional


@dataclass(kw_only=True)
class ChoiceSettings(Settings):
    """Several prompts, candidates, filter."""

    prompts: list[str] = field(default_factory=list)
    """Several prompts, each with a column of its own: caption_0, caption_1, ..., or NAME where it is NAME=PROMPT."""
    candidates: int = 1
    """Captions to sample for an image and prompt."""
    keep: int = 1
    """Candidates to keep, those with the best matching scores; more than one make the columns lists."""
    matching_model: str | None = None
    """Checkpoint of `blipren align` whose matching head scores captions; MODEL itself where it has one."""
    filter: dict = field(default_factory=dict)
    """Captions to refuse, such as {min_matching_score: 0.5, min_mean_logprob: -2, min_tokens: 3, max_tokens: 40,
    min_words: 3, max_words: 30, max_repetition: 0.5, ended: true}. A row without a caption left is rejected."""


@dataclass(kw_only=True)
class OutputSettings(Settings):
    """The data set that is written."""

    out: str | None = None
    """Folder of the captioned data set: all columns of the data, captions and their figures; without it captions are
    printed."""
    format: str = choice("parquet", "webdataset", "metadata", default="parquet")
    """Parquet shards, WebDataset tars, or metadata.jsonl beside the pictures (OUT may be the folder of the pictures)."""
    keep_images: bool = True
    """Put the pictures into Parquet and tars too."""
    split: str | None = None
    """Caption only this split of a data set: train, validation or test."""
    limit: int | None = None
    """Take only the first rows."""
    rows_per_shard: int = 1024
    """Rows of a file, and rows that are captioned again at most after a crash."""
    engine: str = choice("local", "ray", "vllm", default="local")
    """local: this process; ray: Ray Data on a cluster (pip install blipren[ray]); vllm: vLLM's engine in this process."""
    workers: int | None = None
    """Processes that decode pictures; one less than the cores when not given (none without --out), 0 for none."""
    actor_engine: str = choice("local", "vllm", default="local")
    """Ray: what computes in each actor, local or vllm."""
    actors: int | None = None
    """Ray: models at work at the same time; one a GPU, or one for four cores, when not given."""
    precision: str = choice("auto", "float32", "bfloat16", "float16", default="auto")
    """Precision to compute in; the checkpoint's own by default."""


@dataclass(kw_only=True)
class CaptionSettings(OutputSettings, ChoiceSettings, SamplingSettings, GenerationSettings, SourceSettings):
    """`blipren caption`: captions for images and data sets."""

    model: str = positional()
    """Checkpoint folder or Hub id."""
    images: list[str] = positional()
    """Image files and folders of images, searched with their subfolders; or one data set of any kind that embed reads,
    or one feature cache."""
    together: bool = False
    """Ask --prompt once about all image files together, in their order, and print the one answer."""
    json: bool = False
    """Print one JSON object a line instead of text."""
    csv: str | None = None
    """Also write a table with the columns file and caption."""
    attention: str | None = None
    """Also write a PNG with the attention map of every word, of one image."""
    out_image: str | None = None
    """Also write a picture with the boxes and points of the answer and their words, of one image."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("attention", "out_image"):
            several = len(self.images) != 1 or is_dataset(self.images[0]) or Path(self.images[0]).is_dir()
            if getattr(self, name) is not None and several:
                raise UsageError(f"{name} draws one image: give one image file, or leave out {name}")
        if self.together:
            if self.prompt is None or any(is_dataset(name) or Path(name).is_dir() for name in self.images):
                raise UsageError("together asks one question about several images: give image files and --prompt")
            for name in ("out", "csv", "attention", "out_image", "prompts", "filter", "matching_model"):
                if getattr(self, name):
                    raise UsageError(f"together prints one answer: leave out {name}")
        if self.prompts and self.prompt is not None:
            raise UsageError("give prompt or prompts, not both")
        for name in ("candidates", "keep", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("workers", "limit", "actors"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.temperature and self.num_beams > 1:
            raise UsageError("sampling has one beam: leave out num_beams, or temperature")
        if self.candidates > 1 and not self.temperature:
            raise UsageError("candidates are sampled: give a temperature above 0, such as 0.7")
        if self.keep > self.candidates:
            raise UsageError(f"keep is {self.keep}, and there are {self.candidates} candidates")
        for rule, limit in self.filter.items():
            if rule not in FILTER_RULES:
                raise UsageError(f"unknown rule {rule!r} in filter; rules are {', '.join(FILTER_RULES)}")
            if isinstance(limit, bool) != (rule == "ended") or not isinstance(limit, (int, float)):
                raise UsageError(
                    f"{rule} in filter is {limit!r}; it must be {'true' if rule == 'ended' else 'a number'}"
                )
        if self.actor_engine != "local" and self.engine != "ray":
            raise UsageError(f"actor_engine {self.actor_engine} computes in Ray's actors: give --engine ray")
        if self.engine != "local" and self.out is None:
            raise UsageError(f"engine {self.engine} writes a data set: give --out")
        if self.out is not None and (self.csv or self.json or self.attention or self.out_image):
            raise UsageError(
                "csv, json, attention and out_image belong to captions that are printed: leave them out with --out"
            )

    def check_inputs(self) -> None:
        """Raise `UserError` if what the settings name is surely not there."""
        check_checkpoint(self.model)
        if self.matching_model is not None:
            check_checkpoint(self.matching_model)
        if len(self.images) == 1 and is_dataset(self.images[0]):
            check_dataset(self.images[0])
        else:
            check_files(*(name for name in self.images if not Path(name).is_dir()))
        for out in (self.csv, self.attention, self.out_image):
            if out is not None and not Path(out).absolute().parent.is_dir():
                raise UserError(f"{out} cannot be written: there is no folder {Path(out).absolute().parent}")
        if self.out is not None and Path(self.out).is_file():
            raise UserError(f"{self.out} is a file; OUT is a folder")


def run(settings: CaptionSettings) -> int | None:
    """Run the command. Returns the exit status."""
    settings.check_inputs()
    if settings.together:
        from blipren.training.conversation.together import print_one_answer

        return print_one_answer(settings)

    from blipren.training.captioning.job import CaptionJob

    job = CaptionJob.open(settings)
    if settings.out is None:
        from blipren.training.captioning.printed import print_captions

        return print_captions(job)
    job.check_output()
    print(job.describe())
    if settings.engine == "ray":
        from blipren.training.captioning.engines.ray_cluster import caption_with_ray

        return caption_with_ray(settings, job)
    return job.run(Path(settings.out))
