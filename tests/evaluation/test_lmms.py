"""The lmms-eval plugin: found by lmms-eval's registry, answers and losses equal to our own. Needs no network."""

import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from blipren.training.evaluation.generation import generate_answers, load_model
from blipren.training.evaluation.lmms.plugin import CLASS_PATH, MODEL_ID
from tests.evaluation.conftest import QUESTION, colour_picture


def test_entry_point_is_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {
        MODEL_ID: "blipren.training.evaluation.lmms.plugin:manifest"
    }


@pytest.fixture(scope="module")
def lmms_eval():
    return pytest.importorskip("lmms_eval.api.model", reason="lmms-eval (extra `lmms`) is not installed")


def request(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def plugin(lmms_eval, seeing):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from blipren.training.evaluation.lmms.plugin import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    model_class = registry.get_model_class(MODEL_ID)
    assert (
        f"{model_class.__module__}.{model_class.__name__}" == CLASS_PATH
        and CLASS_PATH.rpartition(".")[0] in sys.modules
    )
    model = model_class.create_from_arg_string(f"pretrained={seeing},device=cpu", {"batch_size": 4})
    docs = [{"image": colour_picture(i)} for i in range(6)]
    model.task_dict = {"colours": {"test": docs}}
    return model


def visual(doc):
    return [doc["image"]]


def test_answers_are_ours(plugin, seeing):
    settings = {"max_new_tokens": 8, "until": ["\n"]}
    requests = [request(QUESTION, settings, visual, i, "colours", "test") for i in range(6)]
    requests.append(request("<image>\n" + QUESTION, dict(settings, num_beams=2), visual, 2, "colours", "test"))
    answers = plugin.generate_until(requests)
    model, processor = load_model(str(seeing), "cpu")
    ours = generate_answers(model, processor, [colour_picture(i) for i in range(6)], QUESTION, max_new_tokens=8)
    assert answers[:6] == [a["text"] for a in ours] == ["red", "green", "blue", "yellow", "black", "white"]
    assert answers[6] == "blue"
    stopped = plugin.generate_until([request(QUESTION, {"until": "e"}, visual, 1, "colours", "test")])
    assert stopped == ["gr"]


def test_the_right_choice_has_the_smallest_loss(plugin):
    choices = ["red", "green", "blue"]
    for i, right in enumerate(choices):
        requests = [request(QUESTION, choice, visual, i, "colours", "test") for choice in choices]
        losses, greedy = zip(*plugin.loglikelihood(requests))
        assert min(range(3), key=losses.__getitem__) == i and greedy == tuple(c == right for c in choices)


def test_no_picture_two_pictures_and_no_video(plugin):
    settings = {"max_new_tokens": 3}
    none = request("Hello", settings, lambda doc: [], 0, "colours", "test")
    two = request("What ?", settings, lambda doc: [doc["image"], doc["image"]], 0, "colours", "test")
    assert len(plugin.generate_until([none, two])) == 2
    with pytest.raises(ValueError, match="takes images, and this is str"):
        plugin.generate_until([request("What ?", settings, lambda doc: ["a.mp4"], 0, "colours", "test")])
    with pytest.raises(NotImplementedError, match="one round"):
        plugin.generate_until_multi_round([])
