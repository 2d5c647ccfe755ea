"""`embed --grounding`: boxes become questions of the cache, and no view makes them untrue."""

import json

import numpy as np
import pytest

from tests.data.tools import encoded, picture, run_embed, write_folder


@pytest.fixture
def boxed_folder(tmp_path):
    """Four images without captions: two boxes, a broken one beside a good one, captions alone, nothing at all."""
    rows = [
        {"file_name": "0.png", "objects": [{"category": "dog", "bbox": [0, 0, 24, 20]}], "absent": ["cat"]},
        {
            "file_name": "1.png",
            "objects": [{"category": "dog", "bbox": [0, 0, 24, 20]}, {"category": "cat", "bbox": [0, 0, 90, 9]}],
        },
        {"file_name": "2.png", "captions": ["a plain picture"]},
        {"file_name": "3.png"},
    ]
    rows = [row | {"split": "train"} for row in rows]
    return write_folder(
        tmp_path / "boxed", rows, {row["file_name"]: encoded(picture(k), "PNG") for k, row in enumerate(rows)}
    )


def test_boxes_become_questions(boxed_folder, tiny_model, tmp_path):
    cache = run_embed(tiny_model, boxed_folder, tmp_path / "cache", grounding=["find", "count"], views=3)
    texts = {row["id"]: dict(zip(row["prompts"], row["answers"])) for row in cache.split("train")}
    assert texts == {
        "0.png": {
            "Find every dog.": "[0, 0, 500, 500]",
            "Count every dog.": "1",
            "Find every cat.": "not in the picture",
            "Count every cat.": "0",
        },
        "1.png": {"Find every dog.": "[0, 0, 500, 500]", "Count every dog.": "1"},
        "2.png": {None: "a plain picture"},
    }
    lines = [json.loads(line) for line in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()]
    assert sorted((line["kind"], line["id"], line["reason"]) for line in lines if line["reason"] != "no_text") == [
        ("row", "3.png", "no_caption"),
        ("text", "1.png", "box_outside"),
    ]
    for number, name in enumerate(cache.ids("train")):
        views = [cache.patch_features("train", [number], [view])[0][0].numpy() for view in range(3)]
        same = all(np.array_equal(views[0], view) for view in views)
        assert same == (name != "2.png"), "only an image without boxes is cropped"


def test_without_the_setting_boxes_change_nothing(boxed_folder, tiny_model, tmp_path):
    cache = run_embed(tiny_model, boxed_folder, tmp_path / "cache")
    assert cache.ids("train") == ["2.png"]
    source = json.loads((tmp_path / "cache" / "cache.json").read_text())["fingerprint"]["source"]
    assert set(source) == {"dataset", "columns", "limit"}
