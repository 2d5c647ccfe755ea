"""Pipes, sockets and links in a data set: nothing is waited for, read from elsewhere, or quoted."""

import json
import os
import signal
import socket

import pytest

from blipren.training.commands.caption import CaptionSettings
from blipren.training.commands.caption import run as caption
from blipren.training.data.batches.training_data import read_images
from blipren.training.data.sources.images import ImageError, decode_image
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.data.sources.settings import GroundingSettings
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from blipren.training.evaluation.examples import open_split
from tests.data.tools import encoded, picture, run_embed, write_folder

SECRET = "the password is swordfish\n"


@pytest.fixture(autouse=True)
def at_most_a_minute():
    """A reader that waits for a pipe fails instead of waiting for ever."""

    def give_up(*_):
        raise TimeoutError("waited for a file")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set with a good photo and a link to it, a pipe, a socket, and links that leave the folder."""
    names = ["good.png", "linked.png", "pipe.jpg", "socket.jpg", "folder.jpg", "photo_elsewhere.png", "secret.jpg",
             "elsewhere/secret.txt"]  # fmt: skip
    rows = [{"file_name": f"{name}", "caption": f"a picture called {name.split('.')[0]}"} for name in names]
    folder = write_folder(tmp_path / "data", rows, {"photos/good.png": encoded(picture(0), "PNG")})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret.txt").write_text(SECRET)
    (elsewhere / "photo.png").write_bytes(encoded(picture(1), "PNG"))
    (folder / "good.png").write_bytes(encoded(picture(2), "PNG"))
    (folder / "linked.png").symlink_to("photos/good.png")
    os.mkfifo(folder / "pipe.jpg")
    monkeypatch.chdir(folder)  # a socket's address is short
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "photo_elsewhere.png").symlink_to(elsewhere / "photo.png")
    (folder / "secret.jpg").symlink_to(elsewhere / "secret.txt")
    (folder / "elsewhere").symlink_to(elsewhere)
    yield folder
    server.close()


STRANGE = {"pipe.jpg": "no_regular_file", "socket.jpg": "no_regular_file", "folder.jpg": "no_regular_file"}
LINKS = ("photo_elsewhere.png", "secret.jpg", "elsewhere/secret.txt")


def test_they_are_rejected_rows(folder, tiny_model, tmp_path, capfd):
    everything = {"validation_share": 0.0, "test_share": 0.0}
    for workers in (0, 1):
        cache = run_embed(tiny_model, folder, tmp_path / f"c{workers}", workers=workers, **everything)
        lines = [json.loads(line) for line in (cache.folder / "rejected.jsonl").open()]
        assert {line["id"]: line["reason"] for line in lines} == STRANGE | dict.fromkeys(LINKS, "outside_link")
        assert cache.counts["rows"] == 8 and set(cache.ids("train")) == {"good.png", "linked.png"}
    assert all("--follow-links" in line["value"] for line in lines if line["id"] in LINKS)

    followed = run_embed(tiny_model, folder, tmp_path / "followed", follow_links=True, **everything)
    lines = [json.loads(line) for line in (followed.folder / "rejected.jsonl").open()]
    unreadable = dict.fromkeys(LINKS[1:], "unreadable")
    assert {line["id"]: line["reason"] for line in lines} == STRANGE | unreadable
    assert set(followed.ids("train")) == {"good.png", "linked.png", "photo_elsewhere.png"}
    written = (followed.folder / "rejected.jsonl").read_text() + "".join(capfd.readouterr())
    assert not any(word in written for word in (SECRET[:5], SECRET.encode()[:8].hex(" "), "swordfish"))


def test_the_other_commands_reject_them_too(folder, tiny_model, tmp_path):
    readable = {}
    for example in open_split(str(folder), "train", validation_share=0.0, test_share=0.0).examples:
        readable[example.id] = example.load()
    assert set(readable) == {"good.png", "linked.png"}
    processor = load_checkpoint(str(tiny_model))[1]
    for follow in (False, True):
        source = GroundingSettings(validation_share=0.0, test_share=0.0, follow_links=follow)
        ids = {prepared.row.id for prepared in read_images(str(folder), processor, source)["train"]}
        assert ids == {"good.png", "linked.png"} | ({"photo_elsewhere.png"} if follow else set())
    with pytest.raises(UserError, match="pipe.jpg is a folder, pipe, socket or device"):
        caption(CaptionSettings(model=str(tiny_model), images=[str(folder / "pipe.jpg")], device="cpu"))


def test_a_folder_without_metadata(folder, tmp_path):
    (folder / "metadata.jsonl").unlink()
    source = open_rows(str(folder), text_required=False)
    found = {}
    for row in source:
        try:
            row.load()
        except ImageError as error:
            found[os.path.basename(row.id)] = error.reason
    assert {"photo_elsewhere.png", "secret.jpg"} <= set(found) and set(found.values()) == {"outside_link"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "train.parquet", "train.tar"])
def test_files_of_rows_that_are_pipes_or_lead_elsewhere_are_refused(tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name} is no regular file"):
        open_rows(str(folder))
    (folder / name).unlink()
    (tmp_path / "secret").write_text(SECRET)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name} is a link out of the folder; give --follow-links"):
        open_rows(str(folder))
    with pytest.raises(UserError, match=f"{name} is a link out of the folder"):
        open_rows(f"{folder}/*{name[-4:]}")


def test_metadata_in_a_folder_that_is_a_link_is_refused(tmp_path):
    elsewhere = write_folder(tmp_path / "elsewhere", [{"file_name": "a.png", "caption": SECRET}], {})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(elsewhere)
    with pytest.raises(UserError, match="metadata.jsonl is a link out of the folder"):
        open_rows(str(tmp_path / "data"))
    (row,) = open_rows(str(tmp_path / "data"), follow_links=True)
    assert row.answers == [SECRET.strip()]


def test_links_between_the_folders_of_the_splits_are_read(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(picture(3), "PNG"))
    write_folder(tmp_path / "train", [{"file_name": "a.png", "caption": "a picture"}], {})
    (tmp_path / "train" / "a.png").symlink_to("../images/a.png")
    assert next(iter(open_rows(str(tmp_path)))).load().size == picture(3).size


@pytest.mark.parametrize("data", [SECRET.encode(), b"P6\nswordfish 3\n", b"P3\n1 1\n255\nswordfish", b"GIF89a swordfish",
                                  b"BM swordfish and more than one header's length of it" * 3])  # fmt: skip
def test_what_is_no_picture_is_not_quoted(data):
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert "swordfish" not in str(caught.value) and data[:4].hex(" ") not in str(caught.value)
