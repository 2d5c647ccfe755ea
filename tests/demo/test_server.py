"""The demo's server without a browser: what it refuses, and many visitors at once."""

import gc
import http.server
import re
import threading
import time
import uuid
from pathlib import Path

import requests

from blipren.training.demo.visit import Visit
from blipren.training.evaluation.generation import generate_answers
from tests.demo.conftest import scene
from tests.demo.steps import call
from tests.tiny_models import random_image


def test_no_address_or_file_is_opened_for_a_visitor(address, tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    secret = tmp_path / "secret.png"
    random_image(0).save(secret)
    for path in (f"http://127.0.0.1:{server.server_port}/photo.png", str(secret), f"file://{secret}", "/etc/passwd"):
        meta = {"_type": "gradio.FileData"}
        said = call(address, [{"path": path, "url": path, "meta": meta}], uuid.uuid4().hex)
        assert '"success":false' in said.replace(" ", "") and "Traceback" not in said, said
    server.shutdown()
    assert asked == []
    assert requests.get(f"{address}/gradio_api/file={secret}", timeout=10).status_code in (403, 404)


def test_an_upload_without_an_end_is_cut(address):
    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
        for _ in range(1 << 10):
            yield b"\0" * (1 << 20)

    header = {"Content-Type": "multipart/form-data; boundary=x"}
    try:
        status = requests.post(f"{address}/gradio_api/upload", data=endless(), headers=header, timeout=60).status_code
    except requests.ConnectionError:  # the server hangs up
        status = 413
    assert status == 413
    assert requests.get(address, timeout=10).status_code == 200


def test_fifty_visitors_at_once_get_their_own_answers_and_leave_nothing(address, pair, pictures):
    wanted = [generate_answers(*pair, [scene(i)], "What is it?", max_new_tokens=8)[0]["text"] for i in (0, 1)]
    assert wanted[0] != wanted[1]
    uploaded = []
    for number in (0, 1):
        with (pictures / f"{number}.png").open("rb") as file:
            uploaded += requests.post(f"{address}/gradio_api/upload", files={"files": file}, timeout=10).json()
    said = {}

    def visit(number):
        files = [{"path": uploaded[number % 2], "meta": {"_type": "gradio.FileData"}}]
        session = uuid.uuid4().hex
        with requests.get(f"{address}/gradio_api/heartbeat/{session}", stream=True, timeout=120) as open_tab:
            beats = open_tab.iter_lines()  # kept: without it the connection is closed
            next(beats)
            said[number] = call(address, files, session)

    def memory():
        """Visits that are alive, and megabytes of this process."""
        gc.collect()
        visits = sum(isinstance(thing, Visit) for thing in gc.get_objects())
        return visits, int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    visit(0)
    time.sleep(1)
    before = memory()
    threads = [threading.Thread(target=visit, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(50):
        assert wanted[number % 2] in said[number] and wanted[1 - number % 2] not in said[number]
    for _ in range(50):  # the server notices closed tabs a little later
        after = memory()
        if after[0] <= before[0]:
            break
        time.sleep(0.2)
    assert after[0] <= before[0] and after[1] < before[1] + 30, (before, after)
