"""Bootstrap intervals cover what they claim, and paired ones see small differences."""

import numpy as np
import pytest

from blipren.training.evaluation.metrics.bootstrap import (
    Statistic,
    grouped_statistic,
    interval,
    mean_statistic,
    paired_difference,
    resample_counts,
    resampled_values,
)


def test_interval_of_a_mean_is_the_textbook_one():
    scores = np.random.default_rng(0).normal(5, 2, size=400)
    low, high = interval(mean_statistic(scores), resamples=4000)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert low == pytest.approx(scores.mean() - half, abs=0.03)
    assert high == pytest.approx(scores.mean() + half, abs=0.03)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = interval(mean_statistic(generator.exponential(size=100)), resamples=300, seed=trial)
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_resampling_by_counts_is_resampling_rows():
    rows = np.random.default_rng(2).random((7, 2))
    statistic = Statistic(rows, lambda sums: sums[..., 0] / sums[..., 1])
    counts = resample_counts(7, 5, seed=3)
    assert (counts.sum(axis=1) == 7).all()
    drawn = [np.repeat(rows, c, axis=0) for c in counts]
    expected = [d[:, 0].sum() / d[:, 1].sum() for d in drawn]
    assert resampled_values(statistic, 5, seed=3) == pytest.approx(expected)


def test_same_seed_same_interval_and_slices_do_not_change_its_size():
    statistic = mean_statistic(np.arange(50))
    assert interval(statistic, 500, seed=4) == interval(statistic, 500, seed=4)
    assert interval(statistic, 500, seed=4) != interval(statistic, 500, seed=5)
    big = mean_statistic(np.arange(24_000) % 2)
    assert len(resampled_values(big, 1000)) == 1000


def test_missing_scores_are_left_out():
    statistic = mean_statistic([1.0, None, float("nan"), 0.0])
    assert statistic.value == 0.5
    assert len(resampled_values(statistic, 2000)) < 2000  # draws of missing rows alone have no value


def test_questions_of_an_image_are_drawn_together():
    scores, images = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0], ["a", "a", "b", "b", "b", "c"]
    grouped = grouped_statistic(scores, images)
    assert grouped.value == mean_statistic(scores).value and grouped.rows.tolist() == [[2, 2], [0, 3], [1, 1]]
    many = np.repeat(np.random.default_rng(5).integers(0, 2, size=60), 10)
    wide = interval(grouped_statistic(many, np.repeat(np.arange(60), 10)))
    narrow = interval(mean_statistic(many))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_paired_sees_what_unpaired_cannot():
    generator = np.random.default_rng(6)
    hard = generator.normal(0, 10, size=300)
    a, b = mean_statistic(hard), mean_statistic(hard + generator.normal(0.2, 0.5, size=300))
    found = paired_difference(a, b)
    assert found.low > 0 and found.p_value < 0.01 and found.difference == pytest.approx(b.value - a.value)
    assert interval(a)[1] > interval(b)[0]  # the two intervals overlap
    same = paired_difference(a, a)
    assert same.difference == 0 and same.p_value == 1
    with pytest.raises(ValueError, match="300 against 2"):
        paired_difference(a, mean_statistic([1, 2]))
