"""Record the demo of a model as an animated WebP: an example picture, an answer, two of its words, a second question.

    blipren quickstart --out quickstart-out
    python scripts/record_demo.py quickstart-out/model docs/pictures/demo.webp

Needs Chromium on the PATH, and blipren[dev].
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from blipren.training.demo.page import build_page, launch
from blipren.training.demo.visit import Limits
from blipren.training.evaluation.generation import load_model
from blipren.training.hub.space import TEMPLATES

SIZE = {"width": 1100, "height": 860}
LIMIT = 2_000_000  # bytes


class Recorder:
    """Screenshots of a page, each with the time that it is shown."""

    def __init__(self, page: Page):
        self.page, self.frames, self.milliseconds = page, [], []

    def show(self, milliseconds: int) -> None:
        """Add what the page shows now; the same picture again is only shown longer."""
        frame = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        if self.frames and frame.tobytes() == self.frames[-1].tobytes():
            self.milliseconds[-1] += milliseconds
        else:
            self.frames.append(frame)
            self.milliseconds.append(milliseconds)

    def show_answer(self, number: int) -> None:
        """Record the answer of this number as it grows, which may be at once."""
        answers, ready = self.page.locator(".bot.message"), self.page.locator("#question button.submit-button")
        while answers.count() < number or ready.count() == 0 or answers.last.inner_text().strip() == "…":
            self.show(120)
        self.page.wait_for_timeout(800)
        self.show(1500)

    def look(self, word: int) -> None:
        """Rest the mouse on a word and record its map."""
        label = self.page.locator(".words label").nth(word)
        label.hover()
        self.page.get_by_text(f"Where the model looked for “{label.inner_text()}”").wait_for()
        self.page.wait_for_timeout(1200)
        self.show(1500)

    def save(self, path: Path) -> None:
        """Write the recording."""
        first, *others = self.frames
        first.save(path, save_all=True, append_images=others, duration=self.milliseconds, loop=0, quality=85, method=6)


def record(address: str, path: Path) -> None:
    """Use the page as a visitor does."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("there is no chromium on the PATH to record with")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(address)
        page.wait_for_selector("#question textarea")
        page.wait_for_timeout(2000)
        recorder = Recorder(page)
        recorder.show(1200)
        page.locator("button.example").first.click()
        recorder.show_answer(1)
        for word in (1, 4):
            recorder.look(word)
        page.locator("#question textarea").press_sequentially("Is there a purple triangle?")
        recorder.show(700)
        page.keyboard.press("Enter")
        recorder.show_answer(2)
        recorder.look(0)
        recorder.save(path)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("out", type=Path, help="WebP file to write")
    arguments = parser.parse_args()
    examples = sorted((TEMPLATES / "examples").glob("*.png"))
    page = build_page([(Path(arguments.model).name, *load_model(arguments.model, "cpu"))], Limits(), examples)
    _, address, _ = launch(page, prevent_thread_lock=True)
    record(address, arguments.out)
    page.close()
    size = arguments.out.stat().st_size
    if size > LIMIT:
        raise SystemExit(f"{arguments.out} has {size:,} bytes; it is shown in pages and must stay under {LIMIT:,}")
    print(f"{arguments.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
