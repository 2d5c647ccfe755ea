"""Consensus captions: scores that the other images predict for one that is left out, joined captions, and training."""

import pytest
import torch

from blipren.memory_blipren import MemorySettings
from blipren.training.data.batches.training_data import open_caches, read_caches
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UsageError, UserError
from blipren.training.objectives.experiments.consensus import (
    consensus_captions,
    left_out_weights,
    replace_captions_by_consensus,
)
from blipren.training.stages.train import train


def test_weights_are_those_of_the_regression_without_the_image():
    torch.manual_seed(0)
    images, settings = 6, MemorySettings(ridge=0.5, kernel_width=1.5)
    features, scores = torch.randn(images, 4), torch.rand(images, dtype=torch.double)
    weights, found = left_out_weights(features, settings)
    standard = ((features - features.mean(dim=0)) / features.std(dim=0)).double()
    squares = ((standard[:, None] - standard[None]) ** 2).sum(dim=2)
    assert torch.allclose(found, squares) and weights.sum(dim=1) == pytest.approx(torch.ones(images))
    kernel = torch.exp(-squares / squares.median() / 1.5)
    for left_out in range(images):
        others = [i for i in range(images) if i != left_out]
        mean = scores[others].mean()
        solve = torch.linalg.inv(kernel[others][:, others] + 0.5 * torch.eye(images - 1, dtype=torch.double))
        expected = mean + (scores[others] - mean) @ solve @ kernel[others, left_out]
        assert (weights[left_out] @ scores).item() == pytest.approx(expected.item(), abs=1e-9)
        assert weights[left_out, left_out] == 0


@pytest.fixture
def source(settings, model_dir):
    model, processor = load_checkpoint(str(model_dir))
    sources, _ = open_caches(read_caches(settings().cache), model, processor)
    return sources[0], processor


def test_images_learn_captions_that_others_predict_and_keep_their_questions(source):
    source, processor = source
    own, before = source.references(), [source.texts.answers(i) for i in range(len(source.ids))]
    chosen = consensus_captions(source, 2, processor)
    words = {word for texts in own.values() for text in texts for word in text.split()}
    assert chosen.keys() == own.keys() and all(len(set(texts)) == 2 for texts in chosen.values())
    assert {word for texts in chosen.values() for text in texts for word in text.split()} <= words
    line = replace_captions_by_consensus(source, 2, processor)
    assert line.startswith(f"consensus: {len(own)} images learn 2 captions each that others predict")
    for image in range(len(source.ids)):
        after = source.texts.answers(image)
        assert [a for a in after if a[0] is not None] == [a for a in before[image] if a[0] is not None] != []
        assert [ids for prompt, ids in after if prompt is None] == [
            processor.encode_answer(text) for text in chosen[image]
        ]


def test_captions_come_from_images_with_like_features(source, monkeypatch):
    """Two kinds of images in two corners of the feature space: what is learned is of one's own kind, and joined."""
    source, processor = source
    images = list(source.references())
    kinds = [i % 2 for i in range(len(images))]
    words = ("a dog runs on grass", "one dog runs on sand", "two red kites fly high", "the red kites fly low")
    texts = [words[2 * kind + i // 2 % 2] for i, kind in enumerate(kinds)]
    tokens = [[ids[:-1]] for ids in processor.encode_answers(texts)]
    torch.manual_seed(0)
    embeddings = torch.randn(len(images), 4) * 0.1 + torch.tensor(kinds)[:, None]
    module = "blipren.training.objectives.experiments.consensus"
    monkeypatch.setattr(f"{module}.read_cache", lambda *_: (embeddings, {"tokens": tokens}, 0))
    chosen = list(consensus_captions(source, 4, processor).values())
    dogs = {"a dog runs on grass", "one dog runs on sand", "a dog runs on sand", "one dog runs on grass"}
    assert all(set(own) == dogs for own in chosen[::2]) and not any(set(own) & dogs for own in chosen[1::2])
    monkeypatch.setattr(f"{module}.MOST_IMAGES", 5)
    with pytest.raises(UserError, match=f"2 to 5; .* has {len(kinds)} with captions: leave this experiment out"):
        consensus_captions(source, 1, processor)


def test_training_on_them(settings, capsys):
    assert train(settings(experiments={"consensus": {"captions": 2}})) == 0
    assert "images learn 2 captions each that others predict" in capsys.readouterr().out


@pytest.mark.parametrize(
    "experiments, changes, message",
    [
        ({"consensus": {"captions": 0}}, {}, "captions is 0"),
        ({"consensus": {}}, {"online": True}, "needs a feature cache"),
        ({"consensus": 2}, {}, "must be a mapping of settings: captions"),
        ({"consent": {}}, {}, "experiments has 'consent'; experiments are: consensus, bag_of_words$"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, experiments, changes, message):
    with pytest.raises(UsageError, match=message):
        settings(experiments=experiments, **changes)
