"""Models that write words, their pages on loopback, and Chromium driven by Playwright."""

import contextlib

import pytest
import torch

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.demo.page import build_page, launch
from blipren.training.demo.visit import Limits
from blipren.training.quickstart.scenes import draw_scene, make_scene
from blipren.training.quickstart.steps import TOWERS
from tests.evaluation.report.browser import CHROMIUM
from tests.tiny_models import QFORMER

LIMITS = Limits(pixels=1_000_000, pictures=3, tokens=24)


def scene(number):
    """A drawn picture. `pair` answers 0 and 1 differently."""
    return draw_scene(make_scene(0, number))


def make_pair(seed=0, **options):
    """The quickstart's towers with a random Q-Former, whose answers depend on the picture and do not end by themselves."""
    bases = TOWERS / "vision", TOWERS / "llm"
    torch.manual_seed(seed)
    build = BliprenForConditionalGeneration.from_vision_text_pretrained
    model = build(*bases, num_queries=4, qformer=QFORMER | {"initializer_range": 0.2}, **options)
    processor = BliprenProcessor.from_vision_text_pretrained(*bases, num_queries=4, **options)
    model.generation_config.suppress_tokens = [processor.answer_end_id]
    model.generation_config.no_repeat_ngram_size = 2
    return model.eval(), processor


@contextlib.contextmanager
def served(models, limits=LIMITS, **options):
    """Address of the page of these models."""
    page = build_page(models, limits, **options)
    _, url, _ = launch(page, prevent_thread_lock=True, server_port=None)
    yield url.rstrip("/")
    page.close()


@pytest.fixture(scope="session")
def pair():
    return make_pair()


@pytest.fixture(scope="session")
def address(pair):
    """Address of the model's page."""
    with served([("test model", *pair)]) as url:
        yield url


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Files 0.png and 1.png."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        scene(number).save(folder / f"{number}.png")
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
    """Context manager: a tab of some width that shows a page; errors on its console fail the test if `complete`."""

    @contextlib.contextmanager
    def opened(width=1200, height=900, url=address, complete=True, **options):
        tab = chromium.new_page(viewport={"width": width, "height": height}, **options)
        tab.set_default_timeout(30_000)
        complaints = []
        tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        tab.goto(url)
        tab.wait_for_selector("#question textarea")
        yield tab
        tab.close()
        assert complaints == [] or not complete

    return opened
