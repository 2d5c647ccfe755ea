"""Boxes move with the views of `embed --views`, or their questions are left out and counted."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from blipren.grounding_blipren import read_places
from blipren.training.data.batches.blocks import PromptEncoder
from blipren.training.data.batches.datasets import Layout
from blipren.training.data.batches.prompts import PromptSource
from blipren.training.data.batches.training_data import CachedData
from blipren.training.data.cache.views import View, cut_view, draw_view
from blipren.training.data.sources.grounding import GroundedCaption, GroundedObject, GroundTruth, truth_of_view
from blipren.training.engine.loading import load_checkpoint
from blipren.training.evaluation.metrics.boxes import box_iou
from tests.data.tools import encoded, picture, run_embed, write_folder

SIZE = (200, 100)


def coloured(rng) -> tuple[Image.Image, GroundTruth]:
    """Three rectangles, each in a colour of its own and apart from the others, with their boxes."""
    image, objects = Image.new("RGB", SIZE, "white"), []
    for number, colour in enumerate(("red", "green", "blue")):
        x, y = 65 * number + rng.integers(1, 30), rng.integers(1, 60)
        box = (int(x), int(y), int(x + rng.integers(8, 33)), int(y + rng.integers(8, 38)))
        image.paste(colour, box)
        objects.append(GroundedObject(colour, box))
    return image, GroundTruth(objects)


def test_a_moved_box_is_that_of_the_cut_and_mirrored_picture():
    """The box around the pixels of each colour in the view has an IoU of 1 with the moved box."""
    rng, seen = np.random.default_rng(0), {True: 0, False: 0}
    for number in range(60):
        image, truth = coloured(rng)
        view = draw_view(SIZE, number, "key", True, 0.6)
        part = np.array(cut_view(image, view, keep_size=False).convert("RGB")).astype(int)
        moved, left_out = truth_of_view(truth, *view)
        for thing in truth.objects:
            colour = np.array(image.getpixel((thing.box[0], thing.box[1])))
            rows, columns = np.nonzero((part == colour).all(axis=-1))
            (here,) = [o.box for o in moved.objects if o.category == thing.category] or [None]
            if here is not None:
                drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                assert box_iou([here], [drawn])[0, 0] == 1
                seen[view.mirrored] += 1
            elif thing.category in moved.absent:
                assert not len(rows)
            else:
                assert len(rows) and thing.category in moved.uncounted
                assert any(value.startswith(thing.category) for _, value in left_out)
    assert min(seen.values()) > 20


def test_what_a_view_leaves_out():
    truth = GroundTruth(
        [
            GroundedObject("dog", (10, 10, 50, 50), (20, 30), ("a small dog",)),
            GroundedObject("dog", (80, 10, 120, 50)),
            GroundedObject("cat", (150, 60, 190, 90)),
            GroundedObject("cup", (60, 60, 90, 90)),
            GroundedObject(None, point=(30, 70), expressions=("a knob",)),
        ],
        ["horse"],
        [
            GroundedCaption("a cup", ((5, ((60, 60, 90, 90),)),)),
            GroundedCaption("a cat", ((5, ((150, 60, 190, 90),)),)),
        ],
    )
    moved, left_out = truth_of_view(truth, (0, 0, 100, 100), mirrored=True)
    assert [thing.box for thing in moved.objects] == [(50, 10, 90, 50), (10, 60, 40, 90), None]
    assert moved.objects[0].point == (80, 30) and moved.objects[0].expressions == ("a small dog",)
    assert moved.objects[2].point == (70, 70)
    assert moved.uncounted == {"dog"} and moved.absent == ["horse", "cat"]
    assert moved.captions == [GroundedCaption("a cup", ((5, ((10, 60, 40, 90),)),))]
    assert left_out == [("cut_by_view", "dog [80, 10, 120, 50]"), ("cut_by_view", "a cat")]
    whole, nothing = truth_of_view(truth, (0, 0, *SIZE))
    assert not nothing and whole == truth


@pytest.fixture(scope="module")
def grounded(tmp_path_factory, tiny_model):
    """A cache of four views of images with a caption and a box, of one whose words name a side, and of a plain one."""
    folder = tmp_path_factory.mktemp("moved")
    rows = [
        {"objects": [{"category": "dog", "bbox": [20, 14, 4, 5]}], "caption": "a dog"},
        {"objects": [{"bbox": [20, 14, 4, 5], "expressions": ["the dog on the left"]}], "caption": "a dog"},
        {"objects": [{"category": "dog", "bbox": [0, 0, 47, 39]}]},
        {"caption": "plain"},
    ]
    rows = [row | {"file_name": f"{k}.png", "split": "train"} for k, row in enumerate(rows)]
    write_folder(folder / "data", rows, {f"{k}.png": encoded(picture(k), "PNG") for k in range(len(rows))})
    options = {"grounding": ["find", "refer"], "views": 6, "dtype": "float32"}
    return run_embed(tiny_model, folder / "data", folder / "cache", **options)


def test_the_cache_holds_questions_of_each_view(grounded):
    rows = {row["id"]: row for row in grounded.split("train")}
    assert rows["0.png"]["prompts"] == [None, "Find every dog."]
    for name in ("0.png", "1.png"):
        places = [read_places(answers[0]).boxes[0] if answers else None for answers in rows[name]["view_answers"]]
        digest = rows[name]["image_hash"]
        for number, place in enumerate(places):
            view = draw_view((48, 40), number, digest, name == "0.png", 0.6)
            (x1, y1, x2, y2), mirrored = view
            if place is None:
                assert x1 > 20 or y1 > 14 or x2 < 24 or y2 < 19
                continue
            left = (x2 - 24 if mirrored else 20 - x1) / (x2 - x1)
            assert place[0] == int(1000 * left) and place[1] == int(1000 * (14 - y1) / (y2 - y1))
        assert sum(place is not None for place in places) >= 4 and len(set(places)) > 3
    assert any(draw_view((48, 40), k, rows["0.png"]["image_hash"], True, 0.6).mirrored for k in range(6))
    # nothing is left to say about a part of this image, which is stored whole instead
    whole = grounded.patch_features("train", [2] * 6, list(range(6)))[0]
    assert all(torch.equal(whole[0], view) for view in whole)
    assert rows["2.png"]["view_answers"] == [["[0, 0, 979, 975]"]] * 6
    lines = [json.loads(line) for line in (grounded.folder / "rejected.jsonl").read_text().splitlines()]
    cut = [line["value"] for line in lines if line["reason"] == "cut_by_view" and line["id"] == "2.png"]
    assert cut == [f"view {k}: dog [0.0, 0.0, 47.0, 39.0]" for k in range(1, 6)]
    assert rows["3.png"]["view_answers"] == [[]] * 6


def test_training_asks_what_is_true_of_the_drawn_view(grounded, tiny_model):
    model, processor = load_checkpoint(str(tiny_model))
    data, prompts = CachedData(grounded, "train", model, processor), PromptEncoder(processor)
    row = grounded.split("train")[0]
    layout = Layout(pad_token_id=0, shared_prefix=False)
    drawn = set()
    for epoch in range(20):
        batch = layout.batch([data], prompts, [(0, 0)], (3, epoch))
        view = data.draw_view(0, (3, epoch, 0))
        drawn.add(view)
        shown, expected = batch["inputs"]["patch_features"].float(), grounded.patch_features("train", [0], [view])[0]
        assert all(torch.equal(own, expected[0]) for own in shown)
        answers = [processor.encode_answer("a dog")] + [processor.encode_answer(t) for t in row["view_answers"][view]]
        assert batch["targets"].tolist() == [token for ids in answers for token in ids]
    assert len(drawn) > 3
    assert [ids for _, ids in data.texts.answers(0)] == [processor.encode_answer(t) for t in row["answers"]]
    source = PromptSource(data, {"questions"})  # references of `grpo` are those of the whole image
    whole = grounded.patch_features("train", [0])[0]
    assert all(torch.equal(source.inputs([0], (3, epoch, 0))["patch_features"].float(), whole) for epoch in range(4))


def test_a_view_of_the_whole_image_is_the_image_itself():
    image = picture(0)
    assert cut_view(image, View((0, 0, *image.size)), keep_size=False) is image
