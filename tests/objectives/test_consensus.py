"""Consensus captions: scores of all captions against all images, scores predicted for an image left out, and training."""

import pytest
import torch

from blipren.training.data.batches.training_data import open_caches, read_caches
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UsageError, UserError
from blipren.training.objectives.experiments.consensus import (
    RIDGE,
    caption_scores,
    consensus_captions,
    predicted_scores,
    replace_captions_by_consensus,
)
from blipren.training.objectives.rewards.cider import CiderReward
from blipren.training.stages.train import train

REFERENCES = [
    ["A black dog runs on the grass.", "One dog is running through a green field."],
    ["Two children play with a red ball.", "Kids playing on the beach."],
    ["A man in his blue shirt rides the bicycle.", "A cyclist on some street.", "Someone rides."],
]


def test_scores_are_the_rewards_of_self_critical_training():
    """None of these captions repeats a word, so that clipping makes no difference."""
    captions, image_of, scores = caption_scores(REFERENCES)
    reward = CiderReward({str(i): texts for i, texts in enumerate(REFERENCES)})
    for image in range(3):
        assert scores[:, image].tolist() == pytest.approx(reward([str(image)] * len(captions), captions), abs=1e-5)
    assert image_of.tolist() == [0, 0, 1, 1, 2, 2, 2] and captions[3] == "Kids playing on the beach."


def test_predicted_scores_are_the_regression_without_the_image():
    torch.manual_seed(0)
    images, image_of = 6, torch.arange(6).repeat_interleave(2)
    scores, features = torch.rand(12, images), torch.randn(images, 4)
    found = predicted_scores(scores, image_of, features)
    standard = ((features - features.mean(dim=0)) / features.std(dim=0)).double()
    squares = ((standard[:, None] - standard[None]) ** 2).sum(dim=2)
    kernel = torch.exp(-squares / squares.median())
    for left_out in range(images):
        others = [i for i in range(images) if i != left_out]
        solve = torch.linalg.inv(kernel[others][:, others] + RIDGE * torch.eye(images - 1, dtype=torch.double))
        for caption in range(12):
            if image_of[caption] == left_out:
                assert found[caption, left_out] == -1
                continue
            known = [i for i in range(images) if i != image_of[caption]]
            mean = scores[caption, known].double().mean()
            above = torch.tensor([0.0 if i == image_of[caption] else scores[caption, i] - mean for i in others])
            expected = above.double() @ solve @ kernel[others, left_out] + mean
            assert found[caption, left_out].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.fixture
def source(settings, model_dir):
    model, processor = load_checkpoint(str(model_dir))
    sources, _ = open_caches(read_caches(settings().cache), model, processor)
    return sources[0], processor


def test_images_learn_captions_of_images_alike_and_keep_their_questions(source):
    source, processor = source
    own, before = source.references(), [source.texts.answers(i) for i in range(len(source.ids))]
    chosen = consensus_captions(source, 2)
    everything = {text for texts in own.values() for text in texts}
    assert chosen.keys() == own.keys() and all(len(set(texts)) == 2 for texts in chosen.values())
    assert all(text in everything for texts in chosen.values() for text in texts)
    line = replace_captions_by_consensus(source, 2, processor)
    assert line.startswith(f"consensus: {len(own)} images learn 2 captions of other images each")
    for image in range(len(source.ids)):
        after = source.texts.answers(image)
        assert [a for a in after if a[0] is not None] == [a for a in before[image] if a[0] is not None] != []
        assert [ids for prompt, ids in after if prompt is None] == [
            processor.encode_answer(text) for text in chosen[image]
        ]


def test_captions_come_from_images_with_like_features(source, monkeypatch):
    """Two kinds of images in two corners of the feature space: what is learned is of one's own kind."""
    source, _ = source
    kinds = {image: image % 2 for image in source.references()}
    words = (["a dog runs fast", "the dog is running", "dogs run"], ["one red kite flies", "kite in the sky", "kites"])
    references = {image: [words[kind][image // 2 % 3]] for image, kind in kinds.items()}

    def inputs(images, seed):
        torch.manual_seed(0)
        features = torch.randn(len(images), 3, 4) * 0.1
        features[[i for i, image in enumerate(images) if kinds[image]]] += 1
        return {"patch_features": features}

    monkeypatch.setattr(source, "references", lambda: references)
    monkeypatch.setattr(source, "inputs", inputs)
    assert all(texts[0] in words[kinds[image]] for image, texts in consensus_captions(source, 1).items())
    monkeypatch.setattr("blipren.training.objectives.experiments.consensus.MOST_IMAGES", 5)
    with pytest.raises(UserError, match=f"2 to 5; .* has {len(kinds)} with captions: leave this experiment out"):
        consensus_captions(source, 1)


def test_training_on_them(settings, capsys):
    assert train(settings(experiments={"consensus": {"captions": 2}})) == 0
    assert "images learn 2 captions of other images each" in capsys.readouterr().out


@pytest.mark.parametrize(
    "experiments, changes, message",
    [
        ({"consensus": {"captions": 0}}, {}, "captions is 0"),
        ({"consensus": {}}, {"online": True}, "need a feature cache"),
        ({"consensus": 2}, {}, "must be a mapping of settings: captions"),
        ({"consent": {}}, {}, "experiments has 'consent'; experiments are: consensus, bag_of_words, self_critical"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, experiments, changes, message):
    with pytest.raises(UsageError, match=message):
        settings(experiments=experiments, **changes)
