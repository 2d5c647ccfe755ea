"""`blipren train --push-to`: the finished model is on the Hub with its card, and a push that failed is made good."""

import json

import pytest

from blipren import BliprenForConditionalGeneration
from blipren.training.errors import UsageError, UserError
from blipren.training.stages.train import train
from tests.hub.conftest import hub  # noqa: F401

REPO = "user/blipren-tiny"


def test_a_run_is_trained_and_published(settings, hub, tmp_path, capsys):  # noqa: F811
    run = settings(max_steps=2, push_to=REPO)
    assert train(run) == 0
    output = capsys.readouterr().out
    assert output.index("done: 2 steps") < output.index("published: ")
    repository = hub.repository(REPO)
    files = repository.files("main")
    assert repository.private
    assert {"README.md", "config.json", "model.safetensors", "modeling_blipren.py"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    assert (
        json.loads(repository.read("main", "config.json"))["checkpoint_type"] == "full"
    )  # its bases are local folders
    head = repository.resolve("main")
    assert train(run) == 0  # finished: nothing is trained, nothing is sent
    assert repository.resolve("main") == head
    BliprenForConditionalGeneration.from_pretrained(tmp_path / "run")


def test_a_push_that_failed_is_made_by_the_same_command(settings, hub, tmp_path, monkeypatch, capsys):  # noqa: F811
    run = settings(max_steps=2, push_to=REPO, public=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the Hub is switched off"):
        train(run)
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["steps"] == 2
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    capsys.readouterr()
    assert train(run) == 0
    output = capsys.readouterr().out
    assert "is finished: 2 steps" in output and "published: " in output
    assert not hub.repository(REPO).private


@pytest.mark.parametrize(
    "changes, message",
    [({"push_to": "my model"}, "push_to is 'my model'; it must be user/name"), ({"public": True}, "needs push_to")],
)
def test_wrong_repositories_are_refused(settings, changes, message):
    with pytest.raises(UsageError, match=message):
        settings(**changes)
