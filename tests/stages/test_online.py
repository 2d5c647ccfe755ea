"""Training straight from images: the same loss as from a float32 cache, an encoder that is trained."""

import pytest
import torch

from blipren import BliprenForConditionalGeneration
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.stages import train as caption
from tests import tiny_models
from tests.stages.tools import events, make_model, weights


def test_online_trains_as_the_cache_does(settings, tmp_path, dataset_dir):
    cached = settings(max_steps=3, log_every=1, keep_best="CIDEr")
    online = type(cached)(
        **cached.__dict__ | {"out": str(tmp_path / "online"), "cache": str(dataset_dir), "online": True}
    )
    caption.train(cached)
    caption.train(online)
    for kind in ("train", "validation"):
        losses = [[e["loss"] for e in events(tmp_path / run, kind)] for run in ("run", "online")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    a, b = weights(tmp_path / "run"), weights(tmp_path / "online")
    assert all(torch.allclose(a[k], b[k], rtol=2e-3, atol=2e-4) for k in a)
    ids = [{e["image"] for e in events(tmp_path / run, "sample")} for run in ("run", "online")]
    assert ids[0] == ids[1]


def test_online_and_cache_agree_on_images_in_pieces(settings, bases, dataset_dir, tmp_path):
    second = tiny_models.make_vision(tmp_path / "second", "dinov2")
    # tiles that are padding are cut off in the cache: dropout would draw other numbers
    qformer = tiny_models.QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {"tiles": 2, "qformer": qformer, "projector_options": {"projector_dropout": 0.0}}
    model = make_model(tmp_path / "model", [bases[0], second], bases[1], **options)
    cache = str(tmp_path / "cache")
    embed(EmbedSettings(model=str(model), dataset=str(dataset_dir), cache=cache, dtype="float32", workers=0))
    steps = {"model": str(model), "max_steps": 2, "log_every": 1, "eval_every": 2, "generate_samples": 0}
    caption.train(settings(**steps, cache=cache))
    caption.train(settings(**steps, cache=str(dataset_dir), online=True, out=str(tmp_path / "online")))
    losses = [[e["loss"] for e in events(tmp_path / run, "train")] for run in ("run", "online")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_encoder_can_be_trained_too(settings, tmp_path, dataset_dir, model_dir):
    run = settings(
        cache=str(dataset_dir), online=True, train_vision=True, learning_rates={"vision": 1e-3}, max_steps=2
    )
    caption.train(run)
    before, after = (
        BliprenForConditionalGeneration.from_pretrained(p).state_dict() for p in (model_dir, tmp_path / "run")
    )
    moved = [n for n in before if "vision_tower" in n and not torch.equal(before[n], after[n])]
    assert [n for n in moved if "layers.0" in n] and [n for n in moved if "patch_embedding" in n]
    assert all(torch.equal(before[n], after[n]) for n in before if "language_model" in n)
