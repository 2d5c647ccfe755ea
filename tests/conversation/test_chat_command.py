"""`blipren chat`: a conversation in the terminal, by lines of standard input."""

import io
import json

import pytest

from blipren.training.cli import main
from blipren.training.conversation.conversation import Conversation
from blipren.training.evaluation.generation import generate_answers, load_model
from tests.conversation.test_conversation import make_pair
from tests.tiny_models import random_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model, processor = make_pair(folder, chat=True)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for i in range(2):
        random_image(i).save(folder / f"{i}.png")
    return folder / "model"


def chat(checkpoint, lines, monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert main(["chat", str(checkpoint), *map(str, arguments), "--device", "cpu", "--max-new-tokens", "8"]) == 0
    return capsys.readouterr().out


def test_a_conversation(checkpoint, tmp_path, monkeypatch, capsys):
    first, second, saved = checkpoint.parent / "0.png", checkpoint.parent / "1.png", tmp_path / "saved.json"
    (tmp_path / "page.jpg").write_text("<!doctype html>")
    lines = ["What is it?", f"/image {second}", "Which?", f"/image {tmp_path / 'page.jpg'}", "/wrong", "/save"]
    lines += [f"/save {saved}", "/reset", "What is it?", "", "/quit", "not read"]
    out = chat(checkpoint, lines, monkeypatch, capsys, first)
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == [{"type": "image", "image": str(first)}, {"type": "text", "text": "What is it?"}]
    assert messages[2]["content"] == [{"type": "image", "image": str(second)}, {"type": "text", "text": "Which?"}]
    model, processor = load_model(str(checkpoint), "cpu")
    answer = generate_answers(model, processor, [random_image(0)], "What is it?", max_new_tokens=8)[0]["text"]
    assert messages[1]["content"] == answer and out.count(answer) >= 2  # again behind /reset
    assert "a web page where a picture should be" in out and "there is no /wrong" in out and "/save takes" in out
    assert messages[3]["content"] in out and "not read" not in out


def test_one_question_about_several_images(checkpoint, capsys):
    files = [str(checkpoint.parent / f"{i}.png") for i in (1, 0)]
    line = ["caption", str(checkpoint), *files, "--together", "--prompt", "Which is it?", "--device", "cpu"]
    assert main([*line, "--max-new-tokens", "6"]) == 0
    wanted = Conversation(*load_model(str(checkpoint), "cpu")).ask(
        "Which is it?", [random_image(1), random_image(0)], max_new_tokens=6
    )
    assert capsys.readouterr().out.strip().splitlines()[-1] == wanted
    assert main([*line, "--max-new-tokens", "6", "--json", "--num-beams", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == files
    assert main(["caption", str(checkpoint), *files, "--together"]) == 2
    assert main([*line, "--csv", "a.csv"]) == 2
    errors = capsys.readouterr().err
    assert "give image files and --prompt" in errors and "leave out csv" in errors


def test_wrong_use(checkpoint, capsys):
    assert main(["chat", str(checkpoint), "absent.png"]) == 1
    assert main(["chat", str(checkpoint), "--temperature", "-1"]) == 2
    error = capsys.readouterr().err
    assert "there is no file absent.png" in error and "temperature is -1.0" in error
