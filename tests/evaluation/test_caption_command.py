"""The command `caption`: files and folders, sampling, CSV and the picture of the attention maps."""

import csv
import json
import os

import pytest
from PIL import Image

from blipren.training.cli import main
from tests.evaluation.conftest import QUESTION, colour_picture, new_model, save


@pytest.fixture
def paths(tmp_path):
    """Two image files, red and green."""
    found = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, path in enumerate(found):
        colour_picture(i).save(path)
    return found


@pytest.fixture
def folder(tmp_path):
    """A folder with three images, two of them in subfolders, and files that are none."""
    root = tmp_path / "photos"
    for number, name in enumerate(("b/2.png", "a/1.png", "c.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colour_picture(number).save(root / name)
    (root / "a" / "notes.txt").write_text("red, green")
    (root / "page.jpg").write_text("<!doctype html>")
    (root / "b" / "empty.png").write_bytes(b"")
    os.mkfifo(root / "pipe.jpg")
    outside = tmp_path / "outside"
    outside.mkdir()
    colour_picture(3).save(outside / "yellow.png")
    (root / "link.png").symlink_to(outside / "yellow.png")
    (root / "linked").symlink_to(outside)
    return root


def caption(*arguments) -> int:
    return main(["caption", *map(str, arguments), "--device", "cpu"])


def test_files(seeing, paths, tmp_path, capsys):
    assert caption(seeing, paths[0]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "A red picture ."
    assert caption(seeing, *paths, "--prompt", QUESTION, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(row["image"], row["text"]) for row in rows] == [(paths[0], "red"), (paths[1], "green")]
    assert caption(seeing, tmp_path / "absent.png") == 1
    error = capsys.readouterr().err
    assert "there is no file" in error and "absent.png" in error and len(error.splitlines()) == 1
    broken = tmp_path / "page.jpg"
    broken.write_text("<!doctype html>")
    assert caption(seeing, paths[0], broken) == 1
    output = capsys.readouterr()
    assert "a web page where a picture should be" in output.err and not output.out


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_folder_is_searched_in_order_and_other_files_are_reported(seeing, folder, tmp_path, capsys, batch_size):
    table = tmp_path / "captions.csv"
    assert caption(seeing, folder, "--csv", table, "--batch-size", batch_size) == 0
    output = capsys.readouterr()
    images = [str(folder / name) for name in ("a/1.png", "b/2.png", "c.png")]
    captions = ["The picture is green .", "A red picture .", "The picture is blue ."]
    shown = dict(line.split(": ", 1) for line in output.out.splitlines())
    assert list(shown) == images
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"file": path, "caption": shown[path]} for path in images]
    for path, text in zip(images, captions):
        colour = next(word for word in text.split() if word in ("green", "red", "blue"))
        assert colour in shown[path]
    for name, reason in (
        ("a/notes.txt", "unreadable"), ("page.jpg", "html"), ("b/empty.png", "empty"), ("pipe.jpg", "no_regular_file"),
        ("link.png", "outside_link"), ("linked", "outside_link"),
    ):  # fmt: skip
        assert f"skipped {folder / name} ({reason}): " in output.err
    counted = "empty 1, html 1, no_regular_file 1, outside_link 2, unreadable 1"
    assert f"3 images have a caption, 6 files were skipped: {counted}" in output.err


def test_links_out_of_a_folder_are_read_when_asked(seeing, folder, capsys):
    assert caption(seeing, folder, "--follow-links", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows if "yellow" in row["text"]] == [str(folder / "link.png")]


def test_a_folder_without_images_is_an_error(seeing, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert caption(seeing, tmp_path / "empty") == 1
    assert "there is no image in" in capsys.readouterr().err


def sampled(capsys, *arguments) -> dict[str, str]:
    assert caption(*arguments, "--temperature", "1.5", "--max-new-tokens", "12", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {row["image"]: row["text"] for row in rows}


def test_samples_depend_on_image_and_seed_alone(untrained, tmp_path, capsys):
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, path in enumerate(paths):
        colour_picture(i).save(path)
    together = sampled(capsys, untrained, *paths, "--seed", "3")
    assert len(set(together.values())) == 5
    assert sampled(capsys, untrained, *paths, "--seed", "3", "--batch-size", "2") == together
    assert sampled(capsys, untrained, *reversed(paths[1:]), "--seed", "3", "--batch-size", "1") == {
        path: together[path] for path in paths[1:]
    }
    other = sampled(capsys, untrained, *paths, "--seed", "4")
    assert not set(other.values()) & set(together.values())


def test_repetition_penalty(untrained, paths, capsys):
    def characters(*options) -> int:
        assert caption(untrained, paths[0], "--max-new-tokens", "24", *options) == 0
        return len(set(capsys.readouterr().out))

    assert characters() <= 3, "an untrained model repeats one token"
    assert characters("--repetition-penalty", "5") > 10
    assert characters("--repetition-penalty", "5", "--num-beams", "2") > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0.9"], "top_p is for sampling: give a temperature above 0"),
        (["--seed", "3"], "seed is for sampling: give a temperature above 0"),
        (["--temperature", "0.7", "--num-beams", "3"], "sampling has one beam"),
        (["--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
        (["--temperature", "1", "--top-p", "0"], "top_p is 0.0; it must be above 0"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["other.png", "--attention", "out.png"], "attention draws one image"),
    ],
)
def test_wrong_use_is_one_line(options, message, capsys):
    assert main(["caption", "model", "image.png", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_outputs_need_a_folder(seeing, paths, tmp_path, capsys):
    assert caption(seeing, paths[0], "--csv", tmp_path / "no" / "captions.csv") == 1
    assert "cannot be written: there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("connector", ["qformer", "patches"])
def test_the_attention_picture(tmp_path, paths, capsys, connector):
    model, processor = new_model(tmp_path, connector=connector)
    checkpoint = save(tmp_path / "model", model, processor)
    out = tmp_path / "attention.png"
    assert caption(checkpoint, paths[0], "--attention", out, "--max-new-tokens", "10") == 0
    assert "words are in" in capsys.readouterr().err
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 300
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 22)) > 50
