"""The experiments of a run, from its settings."""

from blipren.training.objectives.experiments.bag_of_words import BagOfWords
from blipren.training.objectives.experiments.consensus import Consensus
from blipren.training.objectives.experiments.experiment import Experiment
from blipren.training.objectives.experiments.settings import ExperimentSettings


def build_experiments(settings: ExperimentSettings) -> list[Experiment]:
    """Return the experiments of a run, in the order in which they are prepared and their losses added."""
    experiments: list[Experiment] = []
    if settings.consensus is not None:
        experiments.append(Consensus(settings.consensus))
    if settings.bag_of_words is not None:
        experiments.append(BagOfWords(settings.bag_of_words))
    return experiments
