"""A tiny full model with a chat template, drawn pictures with captions and questions, and their feature cache."""

import pytest

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from tests import tiny_models
from tests.stages.tools import make_model

pytest.importorskip("trl", reason="TRL is an extra: pip install blipren[trl]")


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory, bases):
    """Without dropout, so that a forward is the same whoever calls it."""
    folder = tmp_path_factory.mktemp("policy")
    llm = tiny_models.make_llm(folder / "llm", chat=True)
    qformer = tiny_models.QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {"projector_dropout": 0.0}
    bridge = make_model(folder / "bridge", bases[0], llm, qformer=qformer, projector_options=options)
    BliprenForConditionalGeneration.from_pretrained(bridge).save_pretrained(folder / "full")
    BliprenProcessor.from_pretrained(bridge).save_pretrained(folder / "full")
    return folder / "full"


@pytest.fixture(scope="session")
def policy_cache(tmp_path_factory, policy_dir, dataset_dir):
    cache = tmp_path_factory.mktemp("policy-cache") / "cache"
    embed(EmbedSettings(model=str(policy_dir), dataset=str(dataset_dir), cache=str(cache), dtype="float32", workers=0))
    return cache
