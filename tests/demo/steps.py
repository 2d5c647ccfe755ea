"""What a visitor of the page does, in a browser and without one."""

import functools
import json

import requests


def upload(tab, *files):
    """Give files to the text box; again where a busy machine shows the page before it works."""
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    for attempt in range(6):
        tab.evaluate(
            "document.querySelector('#question input[type=file]').value = ''"
        )  # as a click on the button does
        tab.set_input_files("#question input[type=file]", [str(file) for file in files])
        try:
            arrived = f"document.querySelectorAll('#question .thumbnail-item').length == {len(files)}"
            tab.wait_for_function(arrived, timeout=5000)
            return
        except PlaywrightTimeout:
            if attempt == 5:
                raise


def ask(tab, question, *files, answers=1):
    """Upload files, type a question, and wait for so many answers. Returns the text of the last."""
    before = tab.locator(".bot.message").count()
    if files:
        upload(tab, *files)
    tab.fill("#question textarea", question)
    tab.press("#question textarea", "Enter")
    return last_answer(tab, before + answers)


def last_answer(tab, count):
    """Wait for the answer of this number, and until it no longer grows. Returns its text."""
    tab.wait_for_function(f"document.querySelectorAll('.bot.message').length == {count}")
    text = "…"
    while text == "…" or text != tab.locator(".bot.message").last.inner_text().strip():
        text = tab.locator(".bot.message").last.inner_text().strip()
        tab.wait_for_selector("#question button.submit-button")
        tab.wait_for_timeout(400)
    return text


def map_of(tab, word, hover=False):
    """Tap a word, or rest the mouse on it, and return the address of its map."""
    before = tab.locator(".map img").get_attribute("src") if tab.locator(".map img").count() else ""
    label = tab.locator(".words label").nth(word)
    label.hover() if hover else label.click()
    tab.wait_for_function("before => (document.querySelector('.map img') || {}).src > '' && document.querySelector('.map img').src != before", arg=before)  # fmt: skip
    tab.wait_for_function("document.querySelector('.map img').naturalWidth > 0")
    return tab.locator(".map img").get_attribute("src")


@functools.cache
def submit_number(address):
    """Number of the function that the text box calls."""
    functions = requests.get(f"{address}/config", timeout=60).json()["dependencies"]
    return next(f["id"] for f in functions if any(target[1] == "submit" for target in f["targets"]))


def call(address, files, session):
    """Send a question with these files as the page does, without a browser. Returns what the server says."""
    data = [{"text": "What is it?", "files": files}, None, 8, 1, 0]
    body = {"data": data, "fn_index": submit_number(address), "session_hash": session}
    requests.post(f"{address}/gradio_api/queue/join", json=body, timeout=60).raise_for_status()
    events = []
    stream = requests.get(
        f"{address}/gradio_api/queue/data", params={"session_hash": session}, stream=True, timeout=120
    )
    for line in stream.iter_lines():
        if line.startswith(b"data:"):
            events.append(line.decode())
            if json.loads(line[5:])["msg"] in ("process_completed", "close_stream"):
                return "\n".join(events)
    raise AssertionError(events)


def paste(tab, path):
    """Paste a picture into the text box, as a browser does with the clipboard."""
    tab.evaluate(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            const event = new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
            document.querySelector("#question textarea").dispatchEvent(event);
        }""",
        [list(path.read_bytes()), path.name],
    )
    tab.wait_for_selector("#question .thumbnail-item")
