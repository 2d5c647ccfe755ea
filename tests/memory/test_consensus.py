"""Predicted CIDEr, joined captions, the n-gram model of known captions and its guidance."""

import numpy as np
import pytest
import torch

from blipren.consensus_blipren import DocumentFrequencies, NgramGuidance, NgramModel, ReferenceTable, join_captions
from blipren.training.objectives.rewards.cider import CiderReward

CAPTIONS = [
    [[5, 6, 7, 8, 9], [5, 6, 7, 9]],
    [[5, 6, 7, 10, 11, 12]],
    [[20, 21, 22, 23], [20, 21, 23, 24, 25]],
    [[20, 21, 22, 30, 31, 32, 33], [40, 41]],
]


def test_predicted_cider_is_cider_d_of_each_image_for_a_weight_of_one():
    table = ReferenceTable(CAPTIONS, DocumentFrequencies(CAPTIONS))
    words = [[" ".join(f"w{token}" for token in caption) for caption in own] for own in CAPTIONS]
    reward = CiderReward(dict(enumerate(words)))
    candidates = [caption for own in CAPTIONS for caption in own] + [[5, 6, 20, 21, 50], [60]]
    texts = [" ".join(f"w{token}" for token in caption) for caption in candidates]
    expected = np.array([reward([image] * len(texts), texts) for image in range(len(CAPTIONS))])
    for image, scores in enumerate(expected):
        assert table.predicted_cider(candidates, np.eye(len(CAPTIONS))[image]) == pytest.approx(scores, abs=1e-6)
    weights = np.array([0.5, -0.2, 0.9, 0.1])
    assert table.predicted_cider(candidates, weights) == pytest.approx(weights @ expected, abs=1e-6)
    assert expected.max() > 5


def test_the_ngram_model_is_a_distribution_that_prefers_what_it_has_seen():
    model = NgramModel([[5, 6, 7, 2], [5, 6, 8, 2], [9, 2]], [1.0, 3.0, 1.0])
    for context in ((), (5,), (5, 6), (5, 6, 8), (9, 6), (77,)):
        ids, logs = model.next_tokens(context)
        assert len(set(ids.tolist())) == len(ids) and logs.exp().sum() == pytest.approx(1, abs=1e-5)
    ids, logs = model.next_tokens((5, 6))
    found = dict(zip(ids.tolist(), logs.exp().tolist()))
    assert found[8] > 2 * found[7] > 0 and max(found, key=found.get) == 8
    scores = torch.zeros(4, 16)
    guide = NgramGuidance([model, None], 0.5, prompt_length=1, rows_per_image=2)
    mixed = guide(torch.tensor([[1, 5, 6], [1, 9, 9], [1, 5, 6], [1, 5, 6]]), scores)
    assert mixed.exp().sum(dim=-1) == pytest.approx(torch.ones(4), abs=1e-5)
    assert mixed[0].argmax() == 8 and mixed[0, 8].exp() == pytest.approx(0.5 / 16 + 0.5 * found[8], abs=1e-5)
    assert mixed[2:].exp() == pytest.approx(torch.full((2, 16), 1 / 16), abs=1e-6)


def test_captions_are_joined_at_two_tokens_that_both_have():
    captions = [(5, 6, 7, 8), (9, 6, 7, 10), (11, 7, 8, 12), (1, 6, 7)]
    joined = join_captions(captions, 6)
    assert set(joined) == {
        (5, 6, 7, 10), (9, 6, 7, 8), (9, 6, 7), (5, 6, 7), (1, 6, 7, 8), (1, 6, 7, 10), (5, 6, 7, 8, 12), (11, 7, 8)
    }  # fmt: skip
    assert len(joined) == len(set(joined)) and (9, 6, 7, 8, 12) in join_captions([*captions, *joined], 6)
    assert (5, 6, 7, 8, 12) not in join_captions(captions, 4) and join_captions([(1, 2), (3, 4)], 6) == []
