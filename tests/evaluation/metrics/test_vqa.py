"""VQA accuracy after the official normalisation."""

import pytest

from blipren.training.errors import UserError
from blipren.training.evaluation.metrics.vqa import (
    answer_table,
    exact_match,
    most_frequent_accuracy,
    normalize_answer,
    soft_score,
    vqa_scores,
)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (" The RED bus. ", "red bus"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("2.5 m.", "2.5 m"),
        ("black/white", "black white"),
        ("dont know", "don't know"),
        ("a", ""),
        ("yes!", "yes"),
        ("t-shirt", "t shirt"),
    ],
)
def test_normalisation(answer, normal):
    assert normalize_answer(answer) == normal


def test_soft_score_of_ten_people():
    people = ["red"] * 2 + ["dark red"] * 8
    # "red": left out once each of two -> 1/3 twice, 2/3 eight times
    assert soft_score("Red", people) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert soft_score("dark red.", people) == 1
    assert soft_score("blue", people) == 0
    assert soft_score("red", ["red"] * 4 + ["blue"] * 6) == 1


def test_few_answers_are_compared_exactly():
    assert soft_score("a circle", ["circle"]) == 1
    assert exact_match("circle", ["square", "Circle."]) == 1
    assert exact_match("circles", ["circle"]) == 0


def test_scores_of_a_set():
    people = {1: ["yes"], 2: ["yes"], 3: ["two"]}
    values, per_question = vqa_scores({1: "yes", 2: "no", 3: "2"}, people)
    assert values == {"accuracy": pytest.approx(2 / 3), "soft_score": pytest.approx(2 / 3)}
    assert per_question[2] == {"exact": 0, "soft": 0}
    questions = {1: "Is there a dog?", 2: "Is there a cat?", 3: "How many?"}
    table = answer_table(questions, people, per_question)
    assert list(table) == ["is there", "how many?"]
    frequent = {"most_frequent_answer": "yes", "most_frequent_accuracy": 1.0}
    assert table["is there"] == {"questions": 2, "accuracy": 0.5} | frequent


def test_the_most_frequent_answer_is_that_of_the_type_of_question():
    questions = {k: f"Is there a {k}?" for k in range(4)} | {4: "What is it?", 5: "What is left?"}
    people = {0: ["no"], 1: ["No."], 2: ["no"], 3: ["yes", "no"], 4: ["dog"], 5: ["cat"]}
    scores = vqa_scores(dict.fromkeys(questions, "yes"), people)[1]
    table = answer_table(questions, people, scores)
    assert (table["is there"]["most_frequent_answer"], table["is there"]["most_frequent_accuracy"]) == ("no", 1.0)
    assert table["what is"]["most_frequent_accuracy"] == 0.5
    assert most_frequent_accuracy(table) == pytest.approx((4 * 1 + 2 * 0.5) / 6)


def test_a_question_without_an_answer_is_an_error():
    with pytest.raises(UserError, match="at least one answer"):
        vqa_scores({1: "yes"}, {1: []})
    with pytest.raises(UserError, match="no answers"):
        vqa_scores({}, {})
