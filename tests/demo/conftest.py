"""A model that writes words, its page on loopback, and Chromium driven by Playwright."""

import contextlib

import pytest
import torch

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.demo.page import build_page, launch
from blipren.training.demo.visit import Limits
from blipren.training.quickstart.steps import TOWERS
from tests.evaluation.report.browser import CHROMIUM
from tests.tiny_models import QFORMER, random_image

LIMITS = Limits(pixels=1_000_000, pictures=3, tokens=24)


@pytest.fixture(scope="session")
def pair():
    """The quickstart's towers with a random Q-Former."""
    bases = TOWERS / "vision", TOWERS / "llm"
    torch.manual_seed(0)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(*bases, qformer=QFORMER, num_queries=4)
    return model.eval(), BliprenProcessor.from_vision_text_pretrained(*bases, num_queries=4)


@pytest.fixture(scope="session")
def address(pair):
    """Address of the model's page."""
    page = build_page(*pair, "test model", LIMITS)
    _, url, _ = launch(page, prevent_thread_lock=True, server_port=None)
    yield url.rstrip("/")
    page.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Files 0.png and 1.png."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        random_image(number, (64, 64)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def chromium():
    playwright_api = pytest.importorskip("playwright.sync_api")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium, address):
    """Context manager: a tab of some width that shows the page; errors on its console fail the test."""

    @contextlib.contextmanager
    def opened(width=1200, height=900):
        tab = chromium.new_page(viewport={"width": width, "height": height})
        tab.set_default_timeout(30_000)
        complaints = []
        tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        tab.goto(address)
        tab.wait_for_selector("#question textarea")
        yield tab
        tab.close()
        assert complaints == []

    return opened
