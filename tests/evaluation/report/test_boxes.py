"""Pictures of boxes: what is drawn where, and words that can be read on any ground."""

import numpy as np
import pytest
from PIL import Image

from blipren.training.cli import main
from blipren.training.evaluation.examples import Example
from blipren.training.evaluation.metrics.boxes import PlaceAnswer
from blipren.training.evaluation.report.boxes import draw_samples, place_items
from blipren.training.evaluation.report.places import draw_places, phrase_of
from blipren.training.evaluation.results import Evaluation

ANSWER = "a cup [100, 300, 500, 700], a dog [600, 600, 990, 990] at [50, 50]"


def test_the_phrase_of_a_prompt():
    assert phrase_of("Find every red car.") == "red car" and phrase_of("Point at every dog.") == "dog"
    assert phrase_of("Find the man (left).") == "man (left)"
    assert phrase_of("What is this?") == phrase_of(None) == ""


@pytest.mark.parametrize("ground", ["black", "white", "gray", "yellow", "noise"])
def test_boxes_and_words_stand_out_from_any_ground(ground):
    image = Image.new("RGB", (500, 500), "gray" if ground == "noise" else ground)
    if ground == "noise":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8))
    drawn = np.asarray(draw_places(image, ANSWER)).astype(int)
    plain = np.asarray(image).astype(int)
    changed = (drawn != plain).any(axis=-1)
    assert (
        changed[150:350, 45:55].any() and not changed[200:300, 100:200].any()
    )  # the edge of the cup's box, its inside
    edge = drawn[250, 40:60].sum(axis=-1)
    assert edge.min() == 0 and edge.max() > 380  # dark beside light
    label = drawn[120:148, 52:100].reshape(-1, 3).sum(axis=-1)
    assert (label < 60).any() and (label > 380).mean() > 0.3  # dark words on a light ground


def test_words_stay_within_the_image_and_small_images_are_enlarged():
    image = Image.new("RGB", (48, 96), "white")
    drawn = draw_places(image, "a very long name of a thing at the edge [900, 0, 990, 30]", true=[(0, 900, 100, 990)])
    assert drawn.size == (480, 960)
    assert drawn.crop((0, 860, 52, 955)).getextrema()[0][0] == 0  # the dashes of the true box
    assert draw_places(image, "no box").getcolors() == [(480 * 960, (255, 255, 255))]


class Picture(Example):
    def load(self):
        return Image.new("RGB", (60, 60))


def test_pictures_of_the_report_are_sorted_by_iou():
    truths = [(0, 0, 100, 100), (0, 0, 200, 100), (0, 0, 400, 100), (500, 500, 600, 600)]
    places = [PlaceAnswer("a", "find", "Find every dog.", str(list(t)), (t,), "[0, 0, 100, 100]") for t in truths]
    result = Evaluation(examples=[Picture("a", None, [], {})], places=places[::-1])
    items = place_items(result, 10)
    assert [item["iou"] for item in items] == [1.0, 0.5, 0.25, 0.0]
    assert items[0]["image"].startswith("data:image/jpeg") and items[0]["question"] == "Find every dog."
    assert [item["iou"] for item in place_items(result, 2)] == [1.0, 0.25]


def test_samples_of_the_card_show_captions_and_boxes():
    """Half of the pictures each; an answer without a box is not shown."""
    names = [f"{k}" for k in range(8)]
    truth = (0, 0, 100, 100)
    places = [PlaceAnswer(k, "find", "Find every dog.", str(list(truth)), (truth,), "[0, 0, 99, 99]") for k in names]
    places[0] = PlaceAnswer("0", "find", "Find every dog.", str(list(truth)), (truth,), "not in the picture")
    result = Evaluation(examples=[Picture(name, None, [], {}) for name in names], places=places)
    result.captions = {name: {"text": f"caption {name}"} for name in names}
    images, captions = draw_samples(result, 6)
    assert captions[:3] == ["caption 0", "caption 2", "caption 5"]
    assert captions[3:] == ["Find every dog. [0, 0, 99, 99]"] * 3 and len(images) == 6
    assert [len(image.getcolors()) > 1 for image in images] == [False] * 3 + [True] * 3


def test_caption_draws_one_image(colours, seeing, tmp_path, capsys):
    picture, out = str(colours / "000.png"), tmp_path / "boxes.png"
    assert main(["caption", str(seeing), picture, "--out-image", str(out)]) == 0
    assert Image.open(out).size == (600, 480) and "the picture with boxes and points is in" in capsys.readouterr().err
    assert main(["caption", str(seeing), picture, picture, "--out-image", str(out)]) == 2
    assert "out_image draws one image" in capsys.readouterr().err
