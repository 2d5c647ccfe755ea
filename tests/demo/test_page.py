"""The demo in a real browser: pictures, streamed answers, maps, and what is no picture."""

import http.server
import json
import struct
import threading
import uuid
import zlib

import pytest
import requests

from blipren.training.conversation.conversation import Conversation
from blipren.training.demo.visit import Limits, Visit
from blipren.training.evaluation.generation import Sampling, generate_answers
from tests.demo.conftest import LIMITS
from tests.evaluation.report.browser import needs_chromium
from tests.tiny_models import random_image

GREEDY = Sampling()


def ask(tab, question, *files):
    """Upload files, type a question, and wait for the answer. Returns its text."""
    before = tab.locator(".bot.message").count()
    if files:
        tab.set_input_files("#question input[type=file]", [str(file) for file in files])
        tab.wait_for_function(f"document.querySelectorAll('#question .thumbnail-item').length == {len(files)}")
    tab.fill("#question textarea", question)
    tab.press("#question textarea", "Enter")
    return last_answer(tab, before + 1)


def last_answer(tab, count):
    """Wait for the answer of this number, and until it no longer grows. Returns its text."""
    tab.wait_for_function(f"document.querySelectorAll('.bot.message').length == {count}")
    text = "…"
    while text == "…" or text != tab.locator(".bot.message").last.inner_text().strip():
        text = tab.locator(".bot.message").last.inner_text().strip()
        tab.wait_for_selector("#question button.submit-button")
        tab.wait_for_timeout(400)
    return text


def map_of(tab, word):
    """Tap a word and return the address of its map."""
    before = tab.locator("#map img").get_attribute("src") if tab.locator("#map img").count() else ""
    tab.locator("#words label").nth(word).click()
    tab.wait_for_function("before => (document.querySelector('#map img') || {}).src > '' && document.querySelector('#map img').src != before", arg=before)  # fmt: skip
    tab.wait_for_function("document.querySelector('#map img').naturalWidth > 0")
    return tab.locator("#map img").get_attribute("src")


@needs_chromium
def test_pictures_answers_and_maps(browse, pair, pictures):
    model, processor = pair
    with browse() as tab:
        first = ask(tab, "What is it?", pictures / "0.png")
        wanted = generate_answers(model, processor, [random_image(0, (64, 64))], "What is it?", max_new_tokens=24)
        assert first == wanted[0]["text"] and len(first.split()) > 3
        assert tab.locator("#words label").all_inner_texts() == first.split()
        maps = {map_of(tab, word) for word in (0, 3)}
        assert len(maps) == 2
        size = tab.evaluate("(() => {const i = document.querySelector('#map img'); return [i.naturalWidth, i.naturalHeight]})()")  # fmt: skip
        assert size == [384, 384] and "Where the model looked for" in tab.locator("#map").inner_text()

        second = ask(tab, "And in this one?", pictures / "1.png")
        fresh = Conversation(model, processor)
        fresh.ask("What is it?", [random_image(0, (64, 64))], max_new_tokens=24)
        assert second == fresh.ask("And in this one?", [random_image(1, (64, 64))], max_new_tokens=24)
        map_of(tab, 1)
        assert tab.evaluate("document.querySelector('#map img').naturalWidth") == 384 * 2 + 8  # a map in each picture
        tab.get_by_role("button", name="What is in the picture?").click()
        assert last_answer(tab, 3) == fresh.ask("What is in the picture?", max_new_tokens=24)
        assert "at most 3 pictures" in ask(tab, "", pictures / "0.png", pictures / "1.png")
        tab.get_by_role("button", name="New conversation").click()
        tab.wait_for_function("document.querySelectorAll('.message').length == 0")
        assert "Add a picture first" in ask(tab, "What is it?")


def bomb() -> bytes:
    """A PNG of 900 million pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


FOREIGN = {
    "page.jpg": (b"<!doctype html><script>alert(1)</script>", "a web page where a picture should be"),
    "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "a vector drawing"),
    "notes.jpg": (b"red, green and blue", "no known picture format"),
    "bomb.png": (bomb(), "too_large"),
}


@needs_chromium
def test_what_is_no_picture_is_told_plainly(browse, pair, pictures, tmp_path):
    with browse(390, 844) as tab:
        for name, (content, message) in FOREIGN.items():
            (tmp_path / name).write_bytes(content)
            answer = ask(tab, "What is it?", tmp_path / name)
            assert name in answer and message in answer, answer
        shown = tab.locator("body").inner_text()
        assert "Traceback" not in shown and "/tmp" not in shown and str(tmp_path) not in shown
        assert ask(tab, "What is it?", pictures / "0.png") in generate_answers(
            *pair, [random_image(0, (64, 64))], "What is it?", max_new_tokens=24
        )[0].values()  # fmt: skip
        map_of(tab, 0)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


@needs_chromium
def test_by_keyboard_alone(browse, pictures):
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    with browse() as tab:

        def tab_to(name):
            for _ in range(40):
                tab.keyboard.press("Tab")
                focused = tab.evaluate("(e => (e.ariaLabel || '') + ' ' + (e.placeholder || '') + ' ' + e.innerText + ' ' + (e.name || '') + ' ' + (e.type || ''))(document.activeElement)")  # fmt: skip
                if name in focused:
                    return
            raise AssertionError(f"the Tab key does not reach {name}")

        tab_to("Upload")
        for attempt in range(6):  # on a busy machine the page shows its buttons before they work
            try:
                with tab.expect_file_chooser(timeout=5000) as chooser:
                    tab.keyboard.press("Enter")
                break
            except PlaywrightTimeout:
                if attempt == 5:
                    raise
        chooser.value.set_files(str(pictures / "0.png"))
        tab.wait_for_selector("#question .thumbnail-item")
        tab_to("Ask about a picture")
        tab.keyboard.type("What is it?")
        tab.keyboard.press("Enter")
        assert last_answer(tab, 1)
        tab.wait_for_selector("#words label")
        tab_to("radio")
        tab.keyboard.press("Space")
        tab.wait_for_selector("#map img")


def call(address, files, session):
    """Send a question with these files as the page does, without a browser. Returns what the server says."""
    data = [{"text": "What is it?", "files": files}, None, 8, 1, 0]
    functions = requests.get(f"{address}/config", timeout=10).json()["dependencies"]
    number = next(f["id"] for f in functions if any(target[1] == "submit" for target in f["targets"]))
    body = {"data": data, "fn_index": number, "session_hash": session}
    requests.post(f"{address}/gradio_api/queue/join", json=body, timeout=10).raise_for_status()
    events = []
    stream = requests.get(
        f"{address}/gradio_api/queue/data", params={"session_hash": session}, stream=True, timeout=60
    )
    for line in stream.iter_lines():
        if line.startswith(b"data:"):
            events.append(line.decode())
            if json.loads(line[5:])["msg"] in ("process_completed", "close_stream"):
                return "\n".join(events)
    raise AssertionError(events)


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


def test_visitors_at_once_get_their_own_answers(address, pair, pictures):
    wanted = [
        generate_answers(*pair, [random_image(i, (64, 64))], "What is it?", max_new_tokens=8)[0]["text"]
        for i in (0, 1)
    ]
    uploaded = []
    for number in (0, 1):
        with (pictures / f"{number}.png").open("rb") as file:
            uploaded += requests.post(f"{address}/gradio_api/upload", files={"files": file}, timeout=10).json()
    said = {}

    def visit(number):
        files = [{"path": uploaded[number % 2], "meta": {"_type": "gradio.FileData"}}]
        said[number] = call(address, files, uuid.uuid4().hex)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(10):
        assert wanted[number % 2] in said[number]


def test_answers_grow_and_a_closed_iterator_stops_the_model(pair):
    visit = Visit(Conversation(*pair, keep_cache=False))
    parts = list(visit.stream("What is it?", [random_image(0)], LIMITS, GREEDY, max_new_tokens=24))
    assert len(set(parts)) > 3 and all(after.startswith(before) for before, after in zip(parts, parts[1:]))
    assert [word for word, _ in visit.words] == parts[-1].split()
    beams = list(visit.stream("And?", [], LIMITS, GREEDY, max_new_tokens=8, num_beams=2))
    assert len(beams) == 1 and visit.conversation.messages[-1]["content"] == beams[0]

    threads = threading.active_count()
    visit = Visit(Conversation(*pair, keep_cache=False))
    stream = visit.stream("What is it?", [random_image(0)], Limits(), GREEDY, max_new_tokens=250)
    next(stream)
    stream.close()
    assert threading.active_count() == threads
    assert len(visit.conversation.messages[-1]["content"].split()) < 200


@pytest.mark.parametrize("command", [["demo", "nothing"], ["demo", "nothing", "--port", "x"]])
def test_wrong_use(command, capsys):
    from blipren.training.cli import main

    if "--port" in command:
        with pytest.raises(SystemExit, match="2"):
            main(command)
    else:
        assert main(command) == 1
        assert "no checkpoint at nothing" in capsys.readouterr().err
