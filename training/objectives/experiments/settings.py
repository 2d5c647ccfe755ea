"""Settings of the experiments that plug into `train`: its setting `experiments` is read here. No torch is imported.

experiments:
  bag_of_words: {weight: 0.05}
  consensus: {captions: 3}
"""

import typing
from dataclasses import dataclass, fields

from blipren.training.errors import UsageError
from blipren.training.settings import Settings


@dataclass(kw_only=True)
class ConsensusSettings(Settings):
    """An image learns captions that the other images predict to fit it best: captions of similar images, and ones that are
    joined from their parts. For small data sets."""

    captions: int = 3
    """Such captions that an image learns in place of its own."""

    def __post_init__(self):
        super().__post_init__()
        if self.captions < 1:
            raise UsageError(f"consensus captions is {self.captions}; it must be at least 1")


@dataclass(kw_only=True)
class BagOfWordsSettings(Settings):
    """Predict which tokens an image's answers hold, from its mean image feature through a linear head that is not kept.
    With likelihood_weight 0 a cheap first stage; later a regularizer."""

    weight: float = 1.0
    """Weight of the loss."""

    def __post_init__(self):
        super().__post_init__()
        if self.weight <= 0:
            raise UsageError(f"bag_of_words weight is {self.weight}; it must be above 0")


@dataclass(kw_only=True)
class ExperimentSettings:
    """The experiments of a run; None for those that it does without."""

    consensus: ConsensusSettings | None = None
    bag_of_words: BagOfWordsSettings | None = None


def parse_experiments(values: dict) -> ExperimentSettings:
    """Return the settings of the experiments that a run names: `{name: {setting: value}}`.

    Raises:
        UsageError: an experiment, a setting of one, or a value does not exist.
    """
    classes = {name: typing.get_args(hint)[0] for name, hint in typing.get_type_hints(ExperimentSettings).items()}
    chosen = {}
    for name, own in values.items():
        if name not in classes:
            raise UsageError(f"experiments has {name!r}; experiments are: {', '.join(classes)}")
        known = [field.name for field in fields(classes[name])]
        if not isinstance(own, dict):
            raise UsageError(f"experiments {name} is {own!r}; it must be a mapping of settings: {', '.join(known)}")
        if unknown := sorted(set(own) - set(known)):
            raise UsageError(f"experiments {name} has a setting {unknown[0]!r}; its settings are: {', '.join(known)}")
        chosen[name] = classes[name](**own)
    return ExperimentSettings(**chosen)
