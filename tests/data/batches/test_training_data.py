"""What batches are made of, read from images: augmentation."""

import json

import torch

from blipren.training.data.batches.training_data import OnlineData, read_images
from blipren.training.data.sources.settings import GroundingSettings
from blipren.training.engine.loading import load_checkpoint


def test_augmentation_draws_views_by_seed_in_training_only(photo_folder, tiny_model):
    model, processor = load_checkpoint(str(tiny_model))
    rows = read_images(str(photo_folder), processor, GroundingSettings())["train"]
    data = OnlineData(rows, model, processor, augment=True)
    plain = data.inputs([3], None)["pixel_values"]
    first, again, other = (data.inputs([3], (0, epoch, 0))["pixel_values"] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, plain)
    unchanged = OnlineData(rows, model, processor, augment=False).inputs([3], (0, 1, 0))["pixel_values"]
    assert torch.equal(plain, unchanged)


def test_an_image_with_boxes_is_never_cropped(photo_folder, tiny_model):
    lines = [json.loads(line) for line in (photo_folder / "metadata.jsonl").read_text().splitlines()]
    lines[3]["objects"] = [{"category": "dog", "bbox": [0, 0, 9, 9]}]
    (photo_folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, processor = load_checkpoint(str(tiny_model))
    rows = read_images(str(photo_folder), processor, GroundingSettings(grounding=["find"]))["train"]
    data = OnlineData(rows, model, processor, augment=True)
    assert "Find every dog." in rows[3].prompts
    for image, same in ((3, True), (4, False)):
        plain, drawn = (data.inputs([image], seed)["pixel_values"] for seed in (None, (0, 0, 0)))
        assert torch.equal(plain, drawn) == same
