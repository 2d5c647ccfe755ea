"""`blipren push --space`: the Space on the loopback Hub, downloaded from there and started without this repository."""

import ast
import os
import subprocess
import sys
import uuid

import requests
import yaml
from huggingface_hub import snapshot_download

from blipren.training.commands.push import PushSettings
from blipren.training.hub.publish import publish
from blipren.training.hub.space import REQUIREMENTS
from tests.demo.test_page import call
from tests.hub.tiny import picture, write_llm, write_model, write_vision

REPO = "user/blipren-tiny"


def test_the_space_is_the_demo_pinned_to_the_published_model(hub, tmp_path):
    bases = write_vision(tmp_path / "vision"), write_llm(tmp_path / "llm", chat=True)
    write_model(tmp_path / "model", *bases)
    licenses = {"vision_license": "apache-2.0", "llm_license": "apache-2.0"}
    settings = PushSettings(model=str(tmp_path / "model"), repo=REPO, space=True, **licenses)
    commit = publish(settings)
    space = hub.repository(REPO, "space")
    first = space.resolve("main")
    assert publish(settings) == commit and space.resolve("main") == first  # nothing new, no new commit
    folder = snapshot_download(REPO, repo_type="space", local_dir=tmp_path / "space")
    card = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and card["models"] == [REPO] and card["app_file"] == "app.py"
    assert f'"revision": "{commit}"' in (tmp_path / "space" / "model.json").read_text()
    pins = dict(line.split("==") for line in (tmp_path / "space" / "requirements.txt").read_text().split())
    assert set(pins) == set(REQUIREMENTS)
    names = {"pillow": "PIL"}
    allowed = {*sys.stdlib_module_names, "blipren", "gradio", *(names.get(name, name) for name in REQUIREMENTS)}
    for path in (tmp_path / "space").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                assert node.module.split(".")[0] in allowed, (path, node.module)
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), path

    picture(1).save(tmp_path / "photo.png")
    environment = os.environ | hub.environment(str(tmp_path / "home")) | {"GRADIO_SERVER_PORT": "7893"}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        address = "http://127.0.0.1:7893"
        for _ in range(240):
            try:
                requests.get(address, timeout=5)
                break
            except requests.ConnectionError:
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                process_wait(process)
        with (tmp_path / "photo.png").open("rb") as file:
            (path,) = requests.post(f"{address}/gradio_api/upload", files={"files": file}, timeout=10).json()
        said = call(address, [{"path": path, "meta": {"_type": "gradio.FileData"}}], uuid.uuid4().hex)
        assert '"success":true' in said.replace(" ", "") and "What is it?" in said and "⚠" not in said
    finally:
        process.kill()
        process.wait()


def process_wait(process):
    """Wait half a second, or until the process ends."""
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        pass
