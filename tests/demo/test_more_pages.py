"""Other pages than that of one model of pictures, and answers that do not come to their end, in a real browser."""

import inspect
import pickle
import time

import pytest

from blipren.training.demo.visit import Limits
from blipren.training.evaluation.generation import generate_answers
from tests.demo.conftest import make_pair, scene, served
from tests.demo.steps import ask, last_answer, map_of, upload
from tests.evaluation.report.browser import needs_chromium
from tests.memory.tools import random_memory

BOX = "circle [100, 200, 500, 700]"


def make_answer(model, processor, answer):
    """Let greedy search give this answer: at each place its next token is likelier by far than all others."""
    ids = processor.encode_answer(answer)
    model.generation_config.suppress_tokens, model.generation_config.no_repeat_ngram_size = None, 0
    model.generation_config.sequence_bias = [[ids[:end], 100.0 * end] for end in range(1, len(ids) + 1)]


def copied(value):
    return pickle.loads(pickle.dumps(value))


def lend_device(function):
    """As `spaces.GPU` of ZeroGPU: another process computes, so arguments and results are copies."""

    def stream(*arguments):
        yield from map(copied, function(*copied(arguments)))

    return stream if inspect.isgeneratorfunction(function) else lambda *given: copied(function(*copied(given)))


@needs_chromium
def test_two_models_side_by_side_and_boxes_on_a_lent_device(browse, pair, pictures):
    other = make_pair(1)
    make_answer(*other, BOX)
    other[0].memory = random_memory(*other, seed=0)
    models = [("before", *pair), ("after", *other)]
    with served(models, on_device=lend_device) as url, browse(url=url) as tab:
        ask(tab, "Find the circle.", pictures / "0.png", answers=2)
        before, after = (tab.get_by_role("log", name=name) for name in ("before", "after"))
        wanted = generate_answers(*pair, [scene(0)], "Find the circle.", max_new_tokens=24)
        assert before.locator(".bot.message").inner_text().strip() == wanted[0]["text"]
        assert BOX in after.locator(".bot.message").inner_text()
        drawn = after.locator(".bot.message img")
        assert drawn.evaluate("image => image.naturalWidth") == 480 and before.locator(".bot.message img").count() == 0
        assert not tab.get_by_role("button", name="Share").first.is_visible()
        words = tab.locator(".words").nth(1)
        assert words.locator("label").all_inner_texts() == BOX.split()
        map_of(tab, len(wanted[0]["text"].split()))  # the first word of the second model
        assert tab.locator(".map img").count() == 1
        assert "“circle”" in tab.locator(".map").inner_text()
        assert tab.get_by_text("Similar known pictures of before").count() == 0
        tab.get_by_text("Similar known pictures of after").click()
        pixels = other[1](images=scene(0), return_tensors="pt")["pixel_values"]
        nearest = other[0].find_neighbours(1, pixel_values=pixels)[0][0]
        tab.get_by_text(f"{nearest['similarity']:.2f}: {' · '.join(nearest['captions'])}").first.wait_for()


@needs_chromium
def test_a_clip(browse, tmp_path):
    model, processor = pair = make_pair(frames=4)
    frames = [scene(number).quantize(64).convert("RGB") for number in range(4)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=250)
    (tmp_path / "notes.mp4").write_text("no clip")
    with served([("clips", *pair)]) as url, browse(390, 844, url=url) as tab:
        assert "notes.mp4 cannot be used (unreadable)" in ask(tab, "What moves?", tmp_path / "notes.mp4")
        answer = ask(tab, "What moves?", tmp_path / "clip.gif")
        clip = processor.video_processor([str(tmp_path / "clip.gif")], return_tensors="pt")
        inputs = processor(text="What moves?", videos=[str(tmp_path / "clip.gif")], return_tensors="pt")
        assert clip["pixel_values_videos"].equal(inputs["pixel_values_videos"])
        wanted = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.decode_answer(wanted)
        map_of(tab, 0)
        assert tab.evaluate("document.querySelector('.map img').naturalWidth") == 4 * 384 + 3 * 8
        label, picture = (tab.locator(f".map {part}").bounding_box() for part in ("[data-testid=block-label]", "img"))
        assert label["y"] + label["height"] <= picture["y"]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.fixture
def slow_pair():
    """A model that needs seconds for its answer."""
    model, processor = make_pair()
    hook = model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    yield model, processor, hook
    hook.remove()


@needs_chromium
def test_stop_and_reload_in_the_middle_of_an_answer(browse, pictures, slow_pair):
    model, processor, hook = slow_pair
    with served([("slow", model, processor)], Limits()) as url, browse(url=url, complete=False) as tab:

        def begin():
            upload(tab, pictures / "0.png")
            tab.fill("#question textarea", "What is it?")
            tab.press("#question textarea", "Enter")
            tab.wait_for_function(
                "(document.querySelector('.bot.message') || {innerText: '…'}).innerText.trim().length > 20"
            )

        begin()
        tab.locator("#question button.stop-button").click()
        tab.wait_for_selector("#question button.submit-button")
        tab.wait_for_timeout(500)
        stopped = tab.locator(".bot.message").inner_text().strip()
        tab.wait_for_timeout(1000)
        assert tab.locator(".bot.message").inner_text().strip() == stopped
        tab.get_by_role("button", name="New conversation").click()
        begin()
        tab.reload()
        tab.wait_for_selector("#question textarea")
        assert tab.locator(".message").count() == 0
        hook.remove()
        begin()
        answer = last_answer(tab, 1)
        wanted = generate_answers(model, processor, [scene(0)], "What is it?", max_new_tokens=64)
        assert answer == wanted[0]["text"] and answer.startswith(stopped) and len(stopped) < len(answer)
