"""What a row says about boxes and points, and the questions that are made of it."""

import math

import datasets
import pytest

from blipren.training.data.sources.boxes import category_names, read_ground_truth
from blipren.training.data.sources.grounding import KINDS, write_questions

SIZE = (200, 100)


def read(record, form="xywh", **options):
    return read_ground_truth([record], SIZE, form, **options)


def one(box, **entry):
    return {"objects": [{"category": "dog", "bbox": box, **entry}]}


@pytest.mark.parametrize(
    ("form", "box"),
    [
        ("xywh", [20, 10, 40, 50]),
        ("xyxy", [20, 10, 60, 60]),
        ("cxcywh", [40, 35, 40, 50]),
        ("xywhn", [0.1, 0.1, 0.2, 0.5]),
        ("xyxyn", [0.1, 0.1, 0.3, 0.6]),
        ("cxcywhn", [0.2, 0.35, 0.2, 0.5]),
    ],
)
def test_all_forms_of_a_box_are_read(form, box):
    for record in (one(box), {"objects": {"category": ["dog"], "bbox": [box], "id": [7]}}):
        truth, problems = read(record, form)
        assert truth.objects[0].box == pytest.approx((20, 10, 60, 60)) and not problems
        truth, _ = read(record | {"bbox_format": form}, "xywh")  # the row's own declaration counts
        assert truth.objects[0].box == pytest.approx((20, 10, 60, 60))


@pytest.mark.parametrize(
    ("box", "form", "reason"),
    [
        ([150, 10, 60, 50], "xywh", "box_outside"),
        ([-5, 10, 60, 50], "xywh", "box_negative"),
        ([0, 10, math.nan, 50], "xywh", "box_nan"),
        ([0, 10, math.inf, 50], "xywh", "box_nan"),
        ([60, 60, 20, 10], "xyxy", "box_swapped_corners"),
        ([20, 10, -5, 10], "xywh", "box_swapped_corners"),
        ([20, 10, 0, 10], "xywh", "box_zero_size"),
        ([20, 10, 0.1, 10], "xywh", "box_zero_size"),
        ([20, 10, 5], "xywh", "box_no_numbers"),
        (["a", 10, 5, 5], "xywh", "box_no_numbers"),
        ([20, 10, 5, 5], "yxyx", "bbox_format"),
    ],
)
def test_broken_boxes_are_counted(box, form, reason):
    truth, problems = read(one(box) | {"bbox_format": form})
    assert [r for r, _ in problems] == [reason] and not truth.objects
    assert not write_questions(truth, SIZE, KINDS)


def test_a_pixel_over_the_edge_is_rounding():
    truth, problems = read(one([-0.4, 0, 200.9, 100.5]))
    assert truth.objects[0].box == (0, 0, 200, 100) and not problems


def test_templates():
    record = {
        "objects": [
            {"category": "dog", "bbox": [100, 0, 50, 50], "expressions": ["the dog on the right", " "]},
            {"category": "dog", "bbox": [0, 0, 50, 50]},
            {"category": "cat", "bbox": [50, 50, 20, 40], "point": [55, 60]},
        ],
        "absent": ["horse"],
        "grounded_captions": [
            {
                "caption": "two dogs over a cat.",
                "phrases": [
                    {"phrase": "two dogs", "bbox": [[0, 0, 50, 50], [100, 0, 50, 50]]},
                    {"phrase": "a cat", "bbox": [50, 50, 20, 40]},
                ],
            }
        ],
    }
    truth, problems = read(record)
    assert not problems
    assert dict(write_questions(truth, SIZE, KINDS)) == {
        "Find every dog.": "[0, 0, 250, 500], [500, 0, 750, 500]",
        "Find every cat.": "[250, 500, 350, 900]",
        "Find every horse.": "not in the picture",
        "Count every dog.": "2",
        "Count every cat.": "1",
        "Count every horse.": "0",
        "Point at every dog.": "[125, 250], [625, 250]",
        "Point at every cat.": "[275, 600]",
        "Point at every horse.": "not in the picture",
        "Find the dog on the right.": "[500, 0, 750, 500]",
        "What is in [500, 0, 750, 500]?": "dog",
        "What is in [0, 0, 250, 500]?": "dog",
        "What is in [250, 500, 350, 900]?": "cat",
        "Caption with boxes:": "two dogs [0, 0, 250, 500], [500, 0, 750, 500] over a cat [250, 500, 350, 900].",
    }
    assert [q for q, _ in write_questions(truth, SIZE, ["count"])] == [
        "Count every dog.",
        "Count every cat.",
        "Count every horse.",
    ]


def test_refcoco_has_a_row_an_object():
    """Two lines about one image, each with a box of its own and what people call it."""
    records = [
        {"bbox": [0, 0, 50, 50], "sentences": [{"raw": "left man"}, {"raw": "man in red"}]},
        {"bbox": [100, 0, 50, 50], "expression": "right man"},
    ]
    truth, problems = read_ground_truth(records, SIZE, "xywh")
    assert not problems and dict(write_questions(truth, SIZE, KINDS)) == {
        "Find the left man.": "[0, 0, 250, 500]",
        "Find the man in red.": "[0, 0, 250, 500]",
        "Find the right man.": "[500, 0, 750, 500]",
    }


def test_categories_that_are_not_wholly_known_are_not_counted():
    record = {
        "objects": [
            {"category": "dog", "bbox": [0, 0, 50, 50]},
            {"category": "dog", "bbox": [0, 0, 500, 50]},
            {"category": "person", "bbox": [0, 0, 50, 50], "iscrowd": 1},
            {"category": "cat", "bbox": [9, 9, 50, 50]},
        ],
        "absent": ["cat", "horse", "person"],
    }
    truth, problems = read(record)
    assert sorted(r for r, _ in problems) == ["absent_is_there", "absent_is_there", "box_outside"]
    asked = [q for q, _ in write_questions(truth, SIZE, KINDS)]
    assert "Find every cat." in asked and "Find every horse." in asked and "What is in [0, 0, 250, 500]?" in asked
    assert not [q for q in asked if q.endswith((" dog.", " person."))]


def test_phrases_that_are_not_in_the_caption_are_counted():
    entry = {"caption": "a dog", "phrases": [{"phrase": "a cat", "bbox": [0, 0, 50, 50]}]}
    truth, problems = read({"grounded_captions": [entry, {"caption": "a dog"}]})
    assert [r for r, _ in problems] == ["phrase_not_in_caption", "grounded_caption"] and not truth.captions


def test_declared_names_of_numbered_categories():
    names = datasets.ClassLabel(names=["cat", "dog"])
    box = datasets.List(datasets.Value("float32"))
    for kind in (
        datasets.List({"category": names, "bbox": box}),
        {"category": datasets.List(names), "bbox": datasets.List(box)},
    ):
        assert category_names(datasets.Features({"objects": kind})) == ["cat", "dog"]
    assert category_names(None) is None and category_names({"objects": datasets.Value("string")}) is None
    truth, problems = read({"objects": [{"category": 1, "bbox": [0, 0, 9, 9]}]}, names=["cat", "dog"])
    assert truth.objects[0].category == "dog" and not problems
    truth, problems = read({"objects": [{"category": 1, "bbox": [0, 0, 9, 9]}]})
    assert problems == [("category_no_text", "1")] and not truth.objects
