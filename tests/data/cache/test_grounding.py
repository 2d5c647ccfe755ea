"""`embed --grounding`: boxes become questions of the cache."""

import json

import pytest

from tests.data.tools import encoded, make_model, picture, run_embed, write_folder
from tests.tiny_models import make_llm


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
    cache = run_embed(tiny_model, boxed_folder, tmp_path / "cache", grounding=["find", "count"])
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


def test_without_the_setting_boxes_change_nothing(boxed_folder, tiny_model, tmp_path):
    cache = run_embed(tiny_model, boxed_folder, tmp_path / "cache")
    assert cache.ids("train") == ["2.png"]
    source = json.loads((tmp_path / "cache" / "cache.json").read_text())["fingerprint"]["source"]
    assert set(source) == {"dataset", "columns", "limit"}


def test_conversations_keep_the_boxes_of_their_image(tiny_vision, tmp_path):
    """Rows about one image have its boxes once; boxes beside several images, or none, are counted."""
    chat_model = make_model(tmp_path / "model", tiny_vision, make_llm(tmp_path / "llm", "qwen2", chat=True))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog"}]
    dog = {"objects": [{"category": "dog", "bbox": [0, 0, 24, 20]}]}
    two = [{"from": "human", "value": "<image><image>\nWhich?"}, turns[1]]
    rows = [
        {"id": "a", "image": "0.png", "conversations": turns} | dog,
        {"id": "b", "image": "0.png", "conversations": [turns[0], {"from": "gpt", "value": "yes"}]} | dog,
        {"id": "c", "image": ["1.png", "2.png"], "conversations": two} | dog,
        {"id": "d", "image": "3.png", "objects": [{"category": "cup", "bbox": [24, 20, 24, 20]}]},
    ]
    rows = [row | {"split": "train"} for row in rows]
    folder = write_folder(tmp_path / "data", [], {f"{k}.png": encoded(picture(k), "PNG") for k in range(4)})
    (folder / "metadata.jsonl").unlink()
    (folder / "talk.json").write_text(json.dumps(rows))
    cache = run_embed(chat_model, folder / "talk.json", tmp_path / "cache", grounding=["find", "count"])
    texts = {row["id"]: dict(zip(row["prompts"], row["answers"])) for row in cache.split("train")}
    assert texts["0.png"] == {"Find every dog.": "[0, 0, 500, 500]", "Count every dog.": "1"}
    assert texts["3.png"] == {"Find every cup.": "[500, 500, 999, 999]", "Count every cup.": "1"}
    assert texts["1.png"] == texts["2.png"] == {} and cache.num_samples("train") == 3
    lines = [json.loads(line) for line in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()]
    assert [(x["id"], x["reason"], x["text"]) for x in lines] == [("c", "several_images", "boxes or points")]
