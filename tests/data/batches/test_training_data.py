"""What batches are made of, read from images: augmentation."""

import torch

from blipren.training.data.batches.training_data import OnlineData, read_images
from blipren.training.data.sources.settings import SourceSettings
from blipren.training.engine.loading import load_checkpoint


def test_augmentation_draws_views_by_seed_in_training_only(photo_folder, tiny_model):
    model, processor = load_checkpoint(str(tiny_model))
    rows = read_images(str(photo_folder), processor, SourceSettings())["train"]
    data = OnlineData(rows, model, processor, augment=True)
    plain = data.inputs([3], None)["pixel_values"]
    first, again, other = (data.inputs([3], (0, epoch, 0))["pixel_values"] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, plain)
    unchanged = OnlineData(rows, model, processor, augment=False).inputs([3], (0, 1, 0))["pixel_values"]
    assert torch.equal(plain, unchanged)
