"""Predicted CIDEr, joined captions, the n-gram model of known captions and its guidance."""

import numpy as np
import pytest
import torch

from blipren.consensus_blipren import (
    AGREED,
    DocumentFrequencies,
    NgramGuidance,
    NgramModel,
    ReferenceTable,
    join_captions,
    search_joined,
    sum_doubts,
)
from blipren.training.objectives.rewards.cider import CiderReward

AGREED_SHARE = 1 - AGREED
CAPTIONS = [
    [[5, 6, 7, 8, 9], [5, 6, 7, 9]],
    [[5, 6, 7, 10, 11, 12]],
    [[20, 21, 22, 23], [20, 21, 23, 24, 25]],
    [[20, 21, 22, 30, 31, 32, 33], [40, 41]],
]


def test_predicted_cider_is_cider_d_of_each_image_for_a_weight_of_one():
    table = ReferenceTable(CAPTIONS, DocumentFrequencies.count(CAPTIONS))
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


def test_the_best_are_joined_again_and_again_and_scored():
    def score(captions):
        return np.array([float(len(set(caption))) for caption in captions])

    start = [(5, 6, 7), (1, 6, 7, 8), (2, 7, 8, 9), (3, 3)]
    for joins, longest in ((0, (1, 6, 7, 8)), (1, (1, 6, 7, 8, 9)), (3, (1, 6, 7, 8, 9))):
        found, scores = search_joined(start, score, joins, 10, 9)
        assert found[:4] == start and len(found) == len(set(found)) and scores == pytest.approx(score(found))
        assert found[int(scores.argmax())] == longest
    assert search_joined(start, score, 3, 1, 9)[0] == start  # one caption alone is not joined


def test_words_that_people_agree_on_and_similar_images_lack_are_doubted():
    captions = [
        [[5, 1, 9], [5, 2, 9]],  # all of two captions say 5 and 9, one says 1 or 2
        [[5, 9], [5, 3, 9]],
        [[6, 9], [6, 4, 9]],
        [[6, 9]],  # alone it says nothing about agreement
    ]
    frequencies = DocumentFrequencies.count(captions)
    assert frequencies.agreement == {5: 1.0, 9: 1.0, 6: 1.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0}
    table = ReferenceTable(captions, frequencies)
    doubts = table.doubts(np.array([0.75, 0.25, 0.25, -0.25]))
    assert doubts == pytest.approx({5: 0.0, 9: 0.0, 6: AGREED_SHARE * 1.0})
    doubts = table.doubts(np.array([0.25, 0.0, 0.5, 0.0]))
    assert doubts == pytest.approx({5: 0.75 * AGREED_SHARE, 9: 0.25 * AGREED_SHARE, 6: 0.5 * AGREED_SHARE})
    doubts = table.doubts(np.array([0.4, 0.3, 0.2, 0.1]))
    candidates = [(5, 9), (6, 9), (6, 5, 5), (7,)]
    less = [sum(doubts[token] for token in set(caption)) for caption in candidates[:3]]
    assert sum_doubts(candidates, doubts) == pytest.approx([*less, 0]) and less[2] > less[1] > less[0]
