"""Settings of the commands that read a data set (embed, evaluate, train --online), and of the caption filter."""

from dataclasses import dataclass, field, fields
from typing import Any

from blipren.training.data.sources.boxes import FORMATS
from blipren.training.data.sources.grounding import KINDS
from blipren.training.errors import UsageError
from blipren.training.settings import Settings, choice


@dataclass(kw_only=True)
class SourceSettings(Settings):
    """Columns and splits of the data set."""

    image_column: str | None = None
    """Column with the images; found by name (image, jpg, file_name, ...) when not given."""
    caption_columns: list[str] = field(default_factory=list)
    """Columns with captions, texts or lists of texts: all of them are used. short_caption/caption takes the first that
    holds text, json.caption looks inside. Found by name when not given."""
    question_column: str | None = None
    """Column with questions (prompts); found by name when not given."""
    answer_column: str | None = None
    """Column with the answers to the questions; found by name when not given."""
    id_column: str | None = None
    """Column with the rows' ids; id, key or the file's name when not given."""
    split_column: str | None = None
    """Column that says train, validation or test; split when there is one."""
    status_column: str | None = None
    """Column of img2dataset that says whether the download succeeded; found by name when not given."""
    dataset_config: str | None = None
    """Configuration of a data set on the Hub."""
    streaming: bool | None = None
    """Read as a stream, without a copy of the data set on disk; by default local Parquet and tars only."""
    follow_links: bool = False
    """Read symbolic links that lead out of the data set's folder; without it, such a row is rejected."""
    validation_share: float = 0.05
    """Share of images for validation, where neither a column nor the data set has splits."""
    test_share: float = 0.05
    """Share of images for the test split, likewise."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("validation_share", "test_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.validation_share + self.test_share >= 1:
            raise UsageError(
                f"validation_share {self.validation_share} and test_share {self.test_share} leave nothing for training"
            )

    def source_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `open_rows` that these settings give."""
        return {name: getattr(self, name) for name in SOURCE_OPTIONS}


@dataclass(kw_only=True)
class GroundingSettings(SourceSettings):
    """Boxes and points."""

    grounding: list[str] = field(default_factory=list)
    """Questions to make of the data set's boxes and points: find, refer, name, count, point, caption."""
    bbox_format: str = choice(*FORMATS, default="xywh")
    """Form of its boxes: xywh is COCO's (left, top, width, height), in pixels; with n in shares of the sides. A column
    bbox_format says it row by row."""

    def __post_init__(self):
        super().__post_init__()
        for kind in self.grounding:
            if kind not in KINDS:
                raise UsageError(f"grounding has {kind!r}; each must be one of {', '.join(KINDS)}")


@dataclass(kw_only=True)
class CaptionFilterSettings(Settings):
    """Caption filter."""

    min_words: int = 1
    """Fewest words."""
    max_words: int | None = 256
    """Most words; null switches the rule off."""
    max_chars: int | None = 2000
    """Most characters; null switches the rule off."""
    max_repetition: float | None = 0.5
    """Largest share of a caption's three-word sequences that repeat an earlier one; one word five times in a row is
    refused too. null switches the rule off."""
    markup: bool = True
    """Refuse HTML tags, entities, URLs and file names."""
    boilerplate: bool = True
    """Refuse credits, shop words, camera file names, refusals of other models."""
    script: str | None = None
    """Script of the letters, as Unicode names it (LATIN, CYRILLIC, ARABIC, CJK, HIRAGANA, ...)."""
    min_script_share: float = 0.9
    """Least share of letters in that script."""
    tidy: bool = False
    """Remove doubled white space and spaces before punctuation marks, as in "a dog runs ."; nothing is refused."""
    duplicates: bool = True
    """Keep one of equal captions of an image (words compared, in lower case)."""
    max_images_per_caption: int | None = None
    """Refuse a caption that more images than this have word for word. All texts are read once for it."""


SOURCE_OPTIONS = tuple(setting.name for setting in fields(SourceSettings))
