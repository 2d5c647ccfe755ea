"""Visual question answering: exact accuracy and the VQA soft score of answers in the official normal form.

Antol et al. 2015 (arXiv:1505.00468) and the evaluation code of VQA v2: lower case, no articles, number words as digits,
contractions with their apostrophe, punctuation off except inside numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from blipren.training.errors import UserError

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
# "dont" -> "don't"; forms that are words themselves ("well", "its") stay as they are
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm i've isn't "
        "it'd it'll might've mightn't must've mustn't needn't shan't should've shouldn't that'd that's there'd there's "
        "they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've "
        "who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
    ).split()
}
_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-<>@`,?!:|#*&%^$~]""")
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)|(?<=\d)\.(?!\d)|(?<!\d)\.(?=\d)")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")


def normalize_answer(answer: str) -> str:
    """Return an answer as the VQA evaluation compares it: `" The RED bus."` -> `"red bus"`, `"Two"` -> `"2"`."""
    text = " ".join(answer.split()).lower()
    text = _COMMA_IN_NUMBER.sub("", text)
    text = _PUNCTUATION.sub(" ", text)
    text = _FULL_STOP.sub("", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the normalised prediction is one of the normalised answers, else 0.0."""
    return float(normalize_answer(prediction) in {normalize_answer(a) for a in answers})


def soft_score(prediction: str, answers: Sequence[str]) -> float:
    """Compute VQA accuracy: min(1, people who gave the answer / 3), averaged over leaving each person out.

    With fewer than four answers, three agreeing others cannot exist, and the score is `exact_match`.
    """
    if len(answers) < 4:
        return exact_match(prediction, answers)
    counts = Counter(normalize_answer(a) for a in answers)
    said = normalize_answer(prediction)
    leave_one_out = [min(1.0, (counts[said] - (normalize_answer(a) == said)) / 3) for a in answers]
    return float(np.mean(leave_one_out))


def vqa_scores(
    predictions: Mapping[object, str], answers: Mapping[object, Sequence[str]]
) -> tuple[dict[str, float], dict[object, dict[str, float]]]:
    """Compute the values over the set, and `exact` and `soft` of each question.

    Args:
        predictions: question id -> answer given. answers: question id -> answers of people, at least one.

    Raises:
        UserError: no questions, ids that differ, or a question without an answer.
    """
    if not predictions:
        raise UserError("there are no answers to score")
    if predictions.keys() != answers.keys() or not all(len(a) and not isinstance(a, str) for a in answers.values()):
        raise UserError("every question needs one prediction and a list of at least one answer, under the same id")
    per_question = {
        k: {"exact": exact_match(predictions[k], answers[k]), "soft": soft_score(predictions[k], answers[k])}
        for k in predictions
    }
    values = {
        "accuracy": float(np.mean([s["exact"] for s in per_question.values()])),
        "soft_score": float(np.mean([s["soft"] for s in per_question.values()])),
    }
    return values, per_question


def vqa_metrics(predictions: Mapping[object, str], answers: Mapping[object, Sequence[str]]) -> dict[str, float]:
    """Compute `accuracy` (exact after normalisation) and `soft_score` (VQA accuracy over several people's answers)."""
    return vqa_scores(predictions, answers)[0]


def answer_table(
    questions: Mapping[object, str],
    answers: Mapping[object, Sequence[str]],
    scores: Mapping[object, Mapping[str, float]],
) -> dict[str, dict]:
    """Return the accuracy by question type, the first two words of the question.

    Args:
        questions, answers, scores: question id -> its text, answers of people, and scores as `vqa_scores` gives them.

    Returns:
        Question type -> `questions`, `accuracy`, and of always giving the type's `most_frequent_answer` (in normal form)
        its `most_frequent_accuracy`: what is guessed without an image.
    """
    types: dict[str, list] = {}
    for key, question in questions.items():
        types.setdefault(" ".join(question.lower().split()[:2]), []).append(key)
    table = {}
    for name, keys in sorted(types.items(), key=lambda item: (-len(item[1]), item[0])):
        given = Counter(answer for key in keys for answer in {normalize_answer(a) for a in answers[key]})
        answer, times = given.most_common(1)[0]
        table[name] = {
            "questions": len(keys),
            "accuracy": float(np.mean([scores[key]["exact"] for key in keys])),
            "most_frequent_answer": answer,
            "most_frequent_accuracy": times / len(keys),
        }
    return table


def most_frequent_accuracy(table: Mapping[str, Mapping]) -> float:
    """Return the accuracy over all questions of giving the most frequent answer of each question's type."""
    questions = sum(own["questions"] for own in table.values())
    return sum(own["questions"] * own["most_frequent_accuracy"] for own in table.values()) / questions
