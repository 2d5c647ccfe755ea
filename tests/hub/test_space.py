"""`blipren push --space`: the Space on the loopback Hub, downloaded from there and started without this repository."""

import ast
import os
import subprocess
import sys
import uuid

import pytest
import requests
import yaml
from huggingface_hub import snapshot_download

from blipren.training.commands.push import PushSettings
from blipren.training.hub.publish import publish
from blipren.training.hub.space import REQUIREMENTS, space_files
from tests.demo.steps import call
from tests.hub.tiny import picture, write_llm, write_model, write_vision

REPO = "user/blipren-tiny"


@pytest.fixture
def space(hub, tmp_path):
    """Folder of a Space, downloaded from the loopback Hub, with a photo beside it."""
    bases = write_vision(tmp_path / "vision"), write_llm(tmp_path / "llm", chat=True)
    write_model(tmp_path / "model", *bases)
    licenses = {"vision_license": "apache-2.0", "llm_license": "apache-2.0"}
    settings = PushSettings(model=str(tmp_path / "model"), repo=REPO, space=True, **licenses)
    commit = publish(settings)
    pushed = hub.repository(REPO, "space")
    first = pushed.resolve("main")
    assert publish(settings) == commit and pushed.resolve("main") == first  # nothing new, no new commit
    assert "spaces/user/blipren-tiny" in hub.repository(REPO).read("main", "README.md").decode()
    picture(1).save(tmp_path / "photo.png")
    folder = tmp_path / "space"
    snapshot_download(REPO, repo_type="space", local_dir=folder)
    assert f'"revision": "{commit}"' in (folder / "model.json").read_text()
    return folder


def check_answer(python, folder, environment, port):
    """Start the Space with a Python of its own, and ask about the photo beside it."""
    environment = os.environ | environment | {"GRADIO_SERVER_PORT": str(port)}
    environment.pop("PYTHONPATH", None)
    output = folder.parent / "log.txt"
    with output.open("w") as log:
        process = subprocess.Popen([python, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                requests.get(address, timeout=5)
                break
            except requests.ConnectionError:
                assert process.poll() is None, output.read_text()
                process_wait(process)
        with (folder.parent / "photo.png").open("rb") as file:
            (path,) = requests.post(f"{address}/gradio_api/upload", files={"files": file}, timeout=10).json()
        said = call(address, [{"path": path, "meta": {"_type": "gradio.FileData"}}], uuid.uuid4().hex)
        assert '"success":true' in said.replace(" ", "") and "What is it?" in said and "⚠" not in said
        assert "three circles" in requests.get(f"{address}/config", timeout=10).text
    finally:
        process.kill()
        process.wait()


def test_the_space_is_the_demo_pinned_to_the_published_model(hub, space):
    card = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and card["models"] == [REPO] and card["app_file"] == "app.py"
    pins = dict(line.split("==") for line in (space / "requirements.txt").read_text().split())
    assert set(pins) == set(REQUIREMENTS)
    assert "Apache-2.0" in (space / "examples" / "LICENSE.txt").read_text()
    names = {"pillow": "PIL"}
    allowed = {*sys.stdlib_module_names, "blipren", "gradio", *(names.get(name, name) for name in REQUIREMENTS)}
    for path in space.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                assert node.module.split(".")[0] in allowed, (path, node.module)
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), path
    check_answer(sys.executable, space, hub.environment(str(space.parent / "home")), 7893)


@pytest.mark.slow
def test_the_space_starts_in_an_environment_of_its_own(hub, space):
    """Minutes: torch and the others are installed from the package index, with the Gradio of the card and `spaces`."""
    environment = space.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    gradio = yaml.safe_load((space / "README.md").read_text().split("---")[1])["sdk_version"]
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "-r",
        space / "requirements.txt",
        f"gradio=={gradio}",
        "spaces",
    ]
    subprocess.run(install, check=True)
    check_answer(python, space, hub.environment(str(space.parent / "home")), 7894)


def test_a_space_for_clips_has_their_decoder():
    (file,) = (file for file in space_files(REPO, "0" * 40, takes_videos=True) if file.name == "requirements.txt")
    assert b"\nav==" in file.source


def process_wait(process):
    """Wait half a second, or until the process ends."""
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        pass
