"""Exchanging one part of the images leaves the others as they are; a part that is ignored is named."""

import pytest
import torch
from tiny_models import QFORMER, make_llm, make_vision, random_image

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.doctor import DoctorSettings
from blipren.training.doctor.checks import CheckFailure, ModelUnderTest, check_parts, draw_test_images
from blipren.training.evaluation.features import encode_images
from blipren.training.evaluation.image_parts import FINE, ORDER, SECOND, exchange_parts, part_use
from blipren.video_blipren import VideoFrames


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    bases = make_vision(folder / "vision"), make_vision(folder / "second", "dinov2"), make_llm(folder / "llm")

    def build(second=False, **options):
        common = (list(bases[:2]) if second else bases[0], bases[2])
        torch.manual_seed(0)
        model = BliprenForConditionalGeneration.from_vision_text_pretrained(
            *common, num_queries=4, qformer=QFORMER, dtype="float32", **options
        )
        return model, BliprenProcessor.from_vision_text_pretrained(*common, num_queries=4, **options)

    return build


PHOTOS = [random_image(i, (64, 48)) for i in range(3)]


def test_higher_resolutions_along_the_channels(make):
    model, processor = make(second=True, scales=[1, 2])
    features = encode_images(model, processor, PHOTOS)
    parts = exchange_parts(model.config, features, [1, 2, 0], seed=0)
    assert set(parts) == {FINE, SECOND}
    own, other = features.patches[0], features.patches[1]  # [scale 1: first, second; scale 2: first, second] x 32
    assert torch.equal(parts[FINE].patches[0], torch.cat([own[:, :64], other[:, 64:]], dim=1))
    mixed = torch.cat([own[:, :32], other[:, 32:64], own[:, 64:96], other[:, 96:]], dim=1)
    assert torch.equal(parts[SECOND].patches[0], mixed)


def test_higher_resolutions_along_the_sequence_and_frames(make):
    model, processor = make(scales=[1, 2], scale_join="sequence", frames=3)
    clips = [[PHOTOS[(i + k) % 3] for k in range(3)] for i in range(3)]
    features = encode_images(model, processor, clips)
    parts = exchange_parts(model.config, features, [1, 2, 0], seed=1)
    frames = features.patches.unflatten(1, (3, 80))
    fine = parts[FINE].patches.unflatten(1, (3, 80))
    assert torch.equal(fine[0, :, :16], frames[0, :, :16]) and torch.equal(fine[0, :, 16:], frames[1, :, 16:])
    turned = parts[ORDER].patches.unflatten(1, (3, 80))
    assert not torch.equal(turned, frames)
    for clip, own in zip(turned, frames):  # the same frames in some order
        assert sorted(float(f.sum()) for f in clip) == pytest.approx(sorted(float(f.sum()) for f in own))


def test_times_in_seconds_stay_where_frames_are_exchanged(make):
    model, processor = make(second=True, scales=[1, 2], frames=3, time_embedding="seconds")
    clips = [VideoFrames([PHOTOS[(i + k) % 3] for k in range(3)], seconds=6.0 + i) for i in range(3)]
    features = encode_images(model, processor, clips)
    assert features.patches[1, ::16, -1].tolist() == pytest.approx([7 / 6, 7 / 2, 35 / 6])
    parts = exchange_parts(model.config, features, [1, 2, 0], seed=1)
    assert set(parts) == {FINE, SECOND, ORDER}
    for part in parts.values():
        assert torch.equal(part.patches[..., -1], features.patches[..., -1])
        assert not torch.equal(part.patches[..., :-1], features.patches[..., :-1])


def test_a_model_of_one_part_has_none(make):
    model, processor = make()
    assert exchange_parts(model.config, encode_images(model, processor, PHOTOS), [1, 2, 0], seed=0) == {}


def test_an_ignored_part_is_named():
    right = [(1.0 + i / 10, 2) for i in range(20)]
    found = part_use(right, {FINE: [(loss + 0.5, n) for loss, n in right], ORDER: list(right)}, resamples=100)
    assert found[FINE]["verdict"] == "used" and found[ORDER]["verdict"] == "ignored"
    assert found[FINE]["loss_gap"]["low"] > 0.2


def test_doctor_finds_frames_without_an_order(make):
    images, captions = draw_test_images(0)
    model, processor = make(frames=4)
    test = ModelUnderTest(model, processor, DoctorSettings(model="m"), images, captions)
    assert "exchanging the order of frames changes the visual tokens" in check_parts(test)
    model.model.qformer.config.time_embedding = None
    with pytest.raises(CheckFailure, match="exchanging the order of frames"):
        check_parts(test)
