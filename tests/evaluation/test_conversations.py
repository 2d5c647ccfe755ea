"""`evaluate` on conversations: each question in its context, multiple choice, exchanging one image of several."""

import json

import pytest
import torch

from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.data.sources.conversations import choice_prompt
from blipren.training.errors import UserError
from blipren.training.evaluation.conversations import choice_of
from blipren.training.evaluation.evaluate import evaluate
from blipren.training.evaluation.generation import generate_answers, load_model
from blipren.training.evaluation.image_use import IGNORES, answer_losses
from tests.evaluation.conftest import COLOURS, QUESTION, colour_picture


def run(model, dataset, out, **changes):
    values = {"tasks": ["vqa"], "device": "cpu", "resamples": 50, "max_new_tokens": 6, "attention_images": 1}
    evaluate(EvaluateSettings(model=str(model), dataset=str(dataset), out=str(out), **values | changes))
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return json.loads((out / "metrics.json").read_text()), list(map(json.loads, lines))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """One conversation of two turns about each of twelve pictures, and one about each picture and the next one."""
    folder, names, rows = tmp_path_factory.mktemp("chats"), list(COLOURS), []
    for i in range(12):
        colour_picture(i).save(folder / f"{i}.png")
        turns = [QUESTION, names[i % 6], "Are you sure ?", "yes"]
        rows.append({"image": f"{i}.png", "texts": turns})
        rows.append({"image": [f"{i}.png", f"{(i + 1) % 12}.png"], "texts": ["Which is larger ?", "the second"]})
    roles = ["user", "assistant"] * 2
    lines = [
        {"id": f"c{n}", "image": row["image"], "split": "test",
         "messages": [{"role": role, "content": text} for role, text in zip(roles, row["texts"])]}
        for n, row in enumerate(rows)
    ]  # fmt: skip
    lines.append({"id": "gone", "image": "nowhere.png", "split": "test", "messages": lines[0]["messages"]})
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "chat.jsonl"


def test_questions_are_answered_in_their_context(seeing, chats, tmp_path):
    metrics, rows = run(seeing, chats, tmp_path / "out")
    assert metrics["vqa"]["questions"] == 12 * 3 and metrics["vqa"]["conversations"] == 24
    assert metrics["counts"]["rejected"] == {"missing_file": 1}
    first = [row for row in rows if row["prompt"] == QUESTION]
    model, processor = load_model(str(seeing), "cpu")
    plain = generate_answers(model, processor, [colour_picture(i) for i in range(12)], QUESTION, max_new_tokens=6)
    assert [row["caption"] for row in first] == [answer["text"] for answer in plain]
    assert sum(row["exact"] for row in first) >= 10
    later = next(row for row in rows if row["turn"] == 3)
    assert later["context"] == f"user: <image>{QUESTION}\nassistant: red\nuser: Are you sure ?"
    assert set(metrics["vqa"]["by_number_of_images"]) == {"1", "2"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Are you sure ?" in page


def test_each_image_of_several_is_exchanged_by_itself(seeing, blind, chats, tmp_path):
    metrics, _ = run(seeing, chats, tmp_path / "a", report=False)
    assert set(metrics["image_use"]["parts"]) == {"the image", "image 1", "image 2"}
    assert metrics["image_use"]["parts"]["the image"]["loss_gap"]["value"] > 0.1
    assert metrics["image_use"]["part"] in metrics["image_use"]["parts"]
    metrics, _ = run(blind, chats, tmp_path / "b", report=False)
    assert {part["verdict"] for part in metrics["image_use"]["parts"].values()} == {IGNORES}
    assert metrics["image_use"]["verdict"] == IGNORES


def test_choices_by_likelihood_and_by_generation(seeing, chats, tmp_path):
    choices = ["red", "green", "blue"]
    rows = [
        {"image": f"{i}.png", "question": QUESTION, "choices": choices, "answer": i % 3, "split": "test"}
        for i in range(6)
    ]
    path = chats.parent / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics, found = run(seeing, path, tmp_path / "out", tasks=["choice"])
    choice = metrics["choice"]
    assert choice["chance"] == pytest.approx(1 / 3) and choice["questions"] == 6
    from blipren.training.evaluation.features import encode_images

    model, processor = load_model(str(seeing), "cpu")
    features = encode_images(model, processor, [colour_picture(i) for i in range(6)])
    prompts = [choice_prompt(QUESTION, choices)] * 6
    losses = torch.tensor(
        [[loss for loss, _ in answer_losses(model, processor, features, prompts, [letter] * 6)] for letter in "ABC"]
    )
    likeliest = losses.argmin(dim=0).tolist()
    assert [row["likeliest"] for row in found] == ["ABC"[n] for n in likeliest]
    assert choice["accuracy_likelihood"] == pytest.approx(sum(n == i % 3 for i, n in enumerate(likeliest)) / 6)
    low, high = choice["intervals"]["accuracy_likelihood"]
    assert low <= choice["accuracy_likelihood"] <= high
    with pytest.raises(UserError, match="questions with choices"):
        run(seeing, chats, tmp_path / "none", tasks=["choice"])


@pytest.mark.parametrize("answer, choice", [
    ("B", 1), ("b.", 1), ("(A)", 0), ("Blue", 1), ("the blue", 1), ("purple", None), ("", None), ("C", None),
])  # fmt: skip
def test_the_choice_that_an_answer_names(answer, choice):
    assert choice_of(answer, ["red", "blue"]) == choice
