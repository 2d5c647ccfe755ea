"""`transformers serve` answers an image chat from a full checkpoint of ours, by its OpenAI-compatible address."""

import base64
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from tests.hub.tiny import picture, write_llm, write_model, write_vision

missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"needs transformers[serving]: {', '.join(missing)} not installed"
)
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    return write_model(root / "full", write_vision(root / "vision"), write_llm(root / "llm", chat=True))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def request(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
        return json.load(answer)


def test_transformers_serve_answers_an_image_chat(full, tmp_path):
    image = picture(4, (48, 40))
    model, processor = BliprenForConditionalGeneration.from_pretrained(full), BliprenProcessor.from_pretrained(full)
    inputs = processor(images=image, text=QUESTION, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    png = io.BytesIO()
    image.save(png, "PNG")
    picture_url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": picture_url}}, {"type": "text", "text": QUESTION}]
    body = {"model": str(full), "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}

    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(full), "--trust-remote-code"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "BLIPREN_IMAGES": "data"}
    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(600):
                try:
                    request(f"http://127.0.0.1:{port}/health")
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
                    time.sleep(0.5)
            try:
                answer = request(f"http://127.0.0.1:{port}/v1/chat/completions", {**body, "stream": False})
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode() + (tmp_path / "log").read_text()[-3000:]) from error
            image.save(tmp_path / "secret.png")
            asked_for = [str(tmp_path / "secret.png"), f"http://127.0.0.1:{port}/health", "file:///etc/passwd"]
            for url in asked_for:
                content[0]["image_url"]["url"] = url
                with pytest.raises(urllib.error.HTTPError):
                    request(f"http://127.0.0.1:{port}/v1/chat/completions", {**body, "stream": False})
        finally:
            server.terminate()
            server.wait(30)
    assert answer["choices"][0]["message"]["content"].strip() == expected.strip()
    log = (tmp_path / "log").read_text()
    assert all(f"image '{url[:80]}' is refused" in log for url in asked_for)
