"""The one resize: a photo's pixels as the processor's own within 1 of 255, in every path, after saving and loading."""

import copy
import pickle

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, Siglip2ImageProcessorPil, SiglipImageProcessorPil

from blipren.image_blipren import with_fast_resize
from blipren.training.engine.loading import load_checkpoint
from tests.data.tools import picture

SIZES = [(640, 480), (333, 500), (224, 224), (100, 90), (1, 1), (300, 3), (1000, 40)]


@pytest.mark.parametrize(
    "make",
    [SiglipImageProcessorPil, CLIPImageProcessorPil, lambda: Siglip2ImageProcessorPil(max_num_patches=64)],
    ids=["siglip", "clip", "naflex"],
)
def test_pixels_within_one_of_the_processors_own(make):
    """Both round twice, so that of drawn pictures and noise single pixels differ by 2; of photos none does (below)."""
    own = make()
    fast = pickle.loads(pickle.dumps(with_fast_resize(copy.deepcopy(own))))
    assert type(fast).__name__ == type(own).__name__ and fast.to_dict() == own.to_dict()
    rng = np.random.default_rng(0)
    for seed, size in enumerate(SIZES):
        noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        for image in (picture(seed, size), noise):
            expected = own(images=[image], return_tensors="np")
            found = fast(images=[image], return_tensors="np")
            assert found.keys() == expected.keys()
            steps = np.abs(found["pixel_values"] - expected["pixel_values"]) * 255
            deviation = np.array(own.image_std)
            if steps.ndim == 4:
                steps = steps * deviation[:, None, None]
            else:  # patches: channels run fastest
                steps = steps * np.resize(deviation, steps.shape[-1])
            assert steps.max() <= 2.001, f"{size}: {steps.max()}"
            assert (steps > 1.001).mean() < 1e-4


def test_photos_within_one(shared_data):
    own = SiglipImageProcessorPil()
    fast = with_fast_resize(copy.deepcopy(own))
    for path in sorted((shared_data("coco-mini") / "images").iterdir())[:40]:
        image = Image.open(path).convert("RGB")
        pixels = [processor(images=[image], return_tensors="np")["pixel_values"] for processor in (own, fast)]
        assert np.abs(pixels[0] - pixels[1]).max() * 127.5 <= 1.001, path.name


def test_other_settings_go_the_processors_own_way():
    own = SiglipImageProcessorPil(resample=0, size={"height": 50, "width": 60})
    fast = with_fast_resize(copy.deepcopy(own))
    image = picture(0, (200, 100))
    assert np.array_equal(own(images=[image])["pixel_values"][0], fast(images=[image])["pixel_values"][0])
    assert with_fast_resize(fast) is fast


def test_every_processor_has_it_after_saving_and_loading(tiny_model, tmp_path):
    _, processor = load_checkpoint(str(tiny_model))
    assert processor.image_processor.resize_backend == "torch_uint8"
    image = picture(0, (200, 100))
    alone = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert (processor(images=[image], return_tensors="pt")["pixel_values"] == alone).all()
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    assert again.image_processor.resize_backend == "torch_uint8"
    assert type(again.image_processor).__name__ == type(processor.image_processor).__name__
