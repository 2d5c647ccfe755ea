"""A tiny model, a folder of drawn pictures with captions and questions, and its feature cache; made once a session."""

import pytest

from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.commands.train import TrainSettings
from blipren.training.stages.train import train
from tests import tiny_models
from tests.stages.tools import draw_dataset, make_model


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return tiny_models.make_vision(folder / "vision"), tiny_models.make_llm(folder / "llm")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, bases):
    return make_model(tmp_path_factory.mktemp("model") / "model", *bases)


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory, model_dir, dataset_dir):
    cache = tmp_path_factory.mktemp("cache") / "cache"
    embed(EmbedSettings(model=str(model_dir), dataset=str(dataset_dir), cache=str(cache), dtype="float32", workers=0))
    return cache


@pytest.fixture
def settings(model_dir, cache_dir, tmp_path):
    """Function from changes to settings of a run of a second or two."""

    def make(**changes) -> TrainSettings:
        values = dict(
            model=str(model_dir),
            cache=str(cache_dir),
            out=str(tmp_path / "run"),
            max_steps=6,
            batch_size=8,
            learning_rate=3e-3,
            log_every=2,
            eval_every=3,
            generate_samples=1,
            max_new_tokens=5,
            device="cpu",
        )
        return TrainSettings(**values | changes)

    return make


@pytest.fixture(scope="session")
def deterministic_model(tmp_path_factory, bases):
    """Without any dropout."""
    qformer = tiny_models.QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return make_model(
        tmp_path_factory.mktemp("deterministic") / "model",
        *bases,
        qformer=qformer,
        projector_options={"projector_dropout": 0.0},
    )


@pytest.fixture(scope="module")
def plain_two_steps(cache_dir, deterministic_model, tmp_path_factory):
    """Function that trains two steps from the same start with some changes, and returns the run folder."""
    folder = tmp_path_factory.mktemp("two-steps")

    def run(name, **changes):
        values = dict(model=str(deterministic_model), cache=str(cache_dir), out=str(folder / name), max_steps=2)
        values |= dict(batch_size=8, eval_every=2, keep_best="last", generate_samples=0, device="cpu")
        if not (folder / name).exists():
            train(TrainSettings(**values | {"learning_rate": 1e-2} | changes))
        return folder / name

    return run
