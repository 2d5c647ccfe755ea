"""Boxes and points as text: round trips, and what the parser takes and refuses."""

import io
import random

import pytest
from PIL import Image

from blipren.grounding_blipren import read_places, to_pixels, write_place
from blipren.training.data.sources.images import decode_image

HALF_A_THOUSANDTH = 0.0005 + 1e-12


@pytest.mark.parametrize("size", [(224, 224), (340, 224), (97, 4000), (4032, 3024), (1, 1), (333.5, 77.25)])
def test_a_round_trip_moves_a_place_by_half_a_thousandth_at_most(size):
    rng = random.Random(0)
    boxes = [(0, 0, *size)]
    while len(boxes) < 300:
        x, y = sorted(rng.uniform(0, size[0]) for _ in "12"), sorted(rng.uniform(0, size[1]) for _ in "12")
        if x[1] - x[0] > size[0] / 500 and y[1] - y[0] > size[1] / 500:
            boxes.append((x[0], y[0], x[1], y[1]))
    text = ", ".join(write_place(box, size) for box in boxes)
    found = read_places(text)
    assert len(found.boxes) == len(boxes) and not found.malformed
    for box, numbers in zip(boxes, found.boxes):
        for k, (before, after) in enumerate(zip(box, to_pixels(numbers, size))):
            assert abs(before - after) <= HALF_A_THOUSANDTH * size[k % 2], (box, numbers)
        assert write_place(to_pixels(numbers, size), size) == f"[{', '.join(map(str, numbers))}]"
    x, y = to_pixels(read_places(write_place(box[:2], size)).points[0], size)
    assert abs(x - box[0]) <= HALF_A_THOUSANDTH * size[0] and abs(y - box[1]) <= HALF_A_THOUSANDTH * size[1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_upright_photo(orientation):
    """A red corner is found by its box in the upright picture, however the file is turned."""
    image = Image.new("RGB", (80, 40), "white")
    image.paste((255, 0, 0), (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    upright = decode_image(stream.getvalue())
    box = upright.convert("L").point(lambda v: 255 * (v < 200)).getbbox()
    numbers = read_places(write_place(box, upright.size)).boxes[0]
    crop = [round(n) for n in to_pixels(numbers, upright.size)]
    assert upright.crop(crop).getcolors() == [((crop[2] - crop[0]) * (crop[3] - crop[1]), (255, 0, 0))]
    assert (crop[2] - crop[0]) * (crop[3] - crop[1]) == 200


def test_spaces_and_line_breaks_do_not_matter():
    found = read_places("[ 1,2 ,3\n,\t4]and[5,6]")
    assert found.boxes == [(1, 2, 3, 4)] and found.points == [(5, 6)] and found.malformed == 0


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "[1]",
        "[1, 2, 3, 1000]",
        "[-1, 2, 3, 4]",
        "[1.5, 2, 3, 4]",
        "[01, 2, 3, 4]",
        "[3, 2, 1, 4]",
        "[1, 4, 3, 2]",
        "[1, 2, 1, 4]",
        "[x1, 2, 3, 4]",
        "[1 2 3 4]",
        "[1, 2, 3, 4",
        "[1, 2, 3, ٤]",
        "[1,, 2, 3]",
    ],
)
def test_malformed_groups_are_counted(text):
    found = read_places(f"a dog {text}")
    assert found.malformed == 1 and not found.boxes and not found.points


def test_brackets_without_digits_are_words():
    assert read_places("a sign that says [no entry], and []").malformed == 0


def test_labels_are_the_words_in_front():
    found = read_places("a man [1, 2, 3, 4] and a blue star [5, 6, 7, 8], [9, 9, 99, 99], near the tree: [7, 7].")
    assert found.labels == ["a man", "a blue star", "a blue star"] and found.point_labels == ["near the tree"]


def test_places_beyond_the_image_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 0, 11, 5\] is not within an image of 10 x 5"):
        write_place((0, 0, 11, 5), (10, 5))


def test_the_processor_gives_pixels(pair):
    _, processor = pair()
    found = processor.post_process_grounding("a dog [0, 500, 999, 999], [250, 250] [1, 2]]", (640, 480))
    assert found["boxes"] == [
        [pytest.approx(0.32), pytest.approx(240.24), pytest.approx(639.68), pytest.approx(479.76)]
    ]
    assert found["labels"] == ["a dog"] and len(found["points"]) == 2 and found["malformed"] == 0
