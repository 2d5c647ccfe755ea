"""The command line: settings from dataclasses and recipes, exit statuses, one clear line for a user's mistake."""

import subprocess
import sys

import pytest
import yaml
from tiny_models import make_llm, make_vision

from blipren import BliprenForConditionalGeneration
from blipren.training.cli import (
    build_settings,
    command_module,
    command_names,
    help_text,
    load_recipe,
    main,
    settings_class,
)
from blipren.training.errors import UsageError
from blipren.training.settings import field_docs

QFORMER = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 64}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return make_vision(root / "vision"), make_llm(root / "llm")


def new(bases, out, *more):
    vision, llm = bases
    return main(["new", str(out), "--vision", str(vision), "--llm", str(llm), "--qformer", QFORMER, *more])


@pytest.mark.parametrize("command", command_names())
def test_every_setting_is_documented_and_helped(command, capsys):
    settings = settings_class(command)
    assert all(field_docs(settings).values())
    assert help_text(command) == command_module(command).__doc__.splitlines()[0]
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in field_docs(settings):
        assert name.replace("_", "-") in shown or name.upper() in shown


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"new": {"vision": "a", "llm": "b", "queries": 8, "projector": "moe"}}))
    settings = build_settings("new", {"out": "x", "queries": 16}, str(recipe))
    assert (settings.vision, settings.queries, settings.projector) == (["a"], 16, "moe")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"new": {"visionn": "a"}}, "unknown setting 'visionn'"),
        ({"knew": {}}, "a section 'knew'"),
        ([1], "must be a mapping"),
        ({"new": {"vision": "a", "llm": "b", "projector": "mpl"}}, "projector is 'mpl'"),
        ({"new": {"vision": "a", "llm": "b", "queries": "many"}}, "queries is 'many'"),
        ({"new": {"vision": "a", "llm": "b", "queries": True}}, "queries is True (bool); it must be int"),
        ({"new": {"vision": "a", "llm": "b", "qformer": "deep"}}, "qformer is 'deep' (str); it must be a mapping"),
        ({"new": {"vision": "a", "llm": "b", "prompts": "Caption:"}}, "(str); it must be list of str"),
        ({"new": {"vision": "a", "llm": "b", "vision_feature_layer": [1, "x"]}}, "it must be list of int"),
    ],
)
def test_wrong_recipes_exit_2_and_name_the_thing(content, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert main(["new", str(tmp_path / "out"), "--config", str(recipe)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_of_recipes():
    assert build_settings("train", {"model": "a", "cache": "b", "out": "c", "epochs": 3}).epochs == 3.0
    with pytest.raises(UsageError, match="learning_rate is '1e-4' .*write 1.0e-4"):
        build_settings("train", {"model": "a", "cache": "b", "out": "c", "learning_rate": "1e-4"})


def test_help_shows_defaults_and_what_is_required(capsys):
    with pytest.raises(SystemExit):
        main(["new", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "visual tokens of the Q-Former. (default: 32)" in shown and "optionally with @revision. (required)" in shown


def test_missing_recipe_names_those_that_ship():
    with pytest.raises(UsageError, match="neither a file nor one of the recipes"):
        load_recipe("no-such-recipe")


def test_new_writes_a_bridge_or_a_full_checkpoint(bases, tmp_path, capsys):
    assert new(bases, tmp_path / "bridge", "--queries", "4") == 0
    assert "4 visual tokens" in capsys.readouterr().out
    assert new(bases, tmp_path / "full", "--queries", "4", "--full", "--seed", "0") == 0
    bridge, full = (BliprenForConditionalGeneration.from_pretrained(tmp_path / n) for n in ("bridge", "full"))
    assert bridge.config.checkpoint_type == "bridge" and full.config.checkpoint_type == "full"
    for (name, a), (_, b) in zip(bridge.state_dict().items(), full.state_dict().items()):
        assert a.equal(b), name  # the same seed gives the same new weights


def test_user_mistakes_are_one_line_and_leave_nothing(bases, tmp_path, capsys):
    vision, llm = bases
    out = tmp_path / "out"
    for arguments, message in (
        (["--vision", str(tmp_path / "nowhere"), "--llm", str(llm)], "there is no folder"),
        (["--vision", str(llm), "--llm", str(llm)], "cannot join"),
        (["--vision", str(vision), "--llm", str(vision)], "cannot join"),
    ):
        assert main(["new", str(out), *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
    assert main(["new", str(out), "--vision", str(vision), "--llm", str(llm), "--qformer", "{depth: 3}"]) == 2
    assert "unknown name 'depth'" in capsys.readouterr().err
    out.mkdir()
    (out / "precious").write_text("x")
    assert new(bases, out) == 1
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["nothing", "file", "foreign"])
def test_folders_that_are_none_of_ours(what, bases, tmp_path, capsys):
    path = tmp_path / "model"
    if what == "foreign":
        path = bases[1]
    elif what == "file":
        path.mkdir()
    assert main(["doctor", str(path)]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1 and ("blipren new" in error or "no checkpoint" in error)


def test_the_installed_command_has_no_traceback():
    result = subprocess.run(
        [sys.executable, "-m", "blipren.training.cli", "doctor", "/no/such/folder"], capture_output=True, text=True
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    result = subprocess.run([sys.executable, "-m", "blipren.training.cli", "new", "x"], capture_output=True, text=True)
    assert result.returncode == 2 and "needs LLM" in result.stderr
