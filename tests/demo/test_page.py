"""The demo in a real browser: pictures, streamed answers, maps, and what is no picture."""

import struct
import zlib

import pytest

from blipren.training.conversation.conversation import Conversation
from blipren.training.evaluation.generation import generate_answers
from tests.demo.conftest import scene
from tests.demo.steps import ask, last_answer, map_of, paste
from tests.evaluation.report.browser import needs_chromium


@needs_chromium
def test_pictures_answers_and_maps(browse, pair, pictures):
    model, processor = pair
    with browse() as tab:
        first = ask(tab, "What is it?", pictures / "0.png")
        wanted = generate_answers(model, processor, [scene(0)], "What is it?", max_new_tokens=24)
        assert first == wanted[0]["text"] and len(first.split()) > 3
        assert tab.locator(".words label").all_inner_texts() == first.split()
        maps = {map_of(tab, 0), map_of(tab, 3)}
        tab.focus("#question textarea")
        maps.add(map_of(tab, 2, hover=True))
        assert len(maps) == 3 and tab.locator(".words input").nth(2).is_checked()
        assert f"“{first.split()[2]}”" in tab.locator(".map").inner_text()
        assert tab.evaluate("document.activeElement.matches('#question textarea')")
        size = tab.evaluate("(() => {const i = document.querySelector('.map img'); return [i.naturalWidth, i.naturalHeight]})()")  # fmt: skip
        assert size == [384, 384] and "Where the model looked for" in tab.locator(".map").inner_text()

        paste(tab, pictures / "1.png")
        second = ask(tab, "And in this one?")
        fresh = Conversation(model, processor)
        fresh.ask("What is it?", [scene(0)], max_new_tokens=24)
        assert second == fresh.ask("And in this one?", [scene(1)], max_new_tokens=24)
        map_of(tab, 1)
        assert tab.evaluate("document.querySelector('.map img').naturalWidth") == 384 * 2 + 8  # a map in each picture
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
            *pair, [scene(0)], "What is it?", max_new_tokens=24
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
        tab.wait_for_selector(".words label")
        tab_to("radio")
        tab.keyboard.press("Space")
        tab.wait_for_selector(".map img")


@needs_chromium
@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 390)])
def test_axe_finds_no_serious_fault(browse, pictures, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with browse(width, 900, color_scheme=scheme) as tab:
        ask(tab, "What is it?", pictures / "0.png")
        map_of(tab, 0)
        tab.get_by_text("Settings", exact=True).click()
        assert (tab.evaluate("document.body.classList.contains('dark')")) == (scheme == "dark")
        found = axe.run(tab).response["violations"]
        serious = {f["id"]: [n["html"] for n in f["nodes"]] for f in found if f["impact"] in ("serious", "critical")}
        assert serious == {}
