"""Caches of scales, tiles and two encoders: bytes stated before, features of the model, refusal by another model."""

import pytest
import torch

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.train import TrainSettings
from blipren.training.data.batches.training_data import open_caches, open_online
from blipren.training.errors import UserError
from tests.data.tools import make_model, run_embed
from tests.tiny_models import make_vision

KINDS = {
    "channels": ({"scales": [1, 2]}, "16 patches x 64 x float32 (of 5 pieces) = 4,096 bytes"),
    "sequence": (
        {"scales": [1, 2], "scale_join": "sequence"},
        "80 patches x 32 x float32 (of 5 pieces) = 10,240 bytes",
    ),
    "two encoders": ({}, "16 patches x 64 x float32 = 4,096 bytes"),
    "tiles": ({"tiles": 4}, "at most 5 pieces = at most 10,240 bytes"),
}


@pytest.fixture(scope="module")
def second_vision(tmp_path_factory):
    return make_vision(tmp_path_factory.mktemp("second"), "dinov2")


@pytest.mark.parametrize("kind", KINDS)
def test_cached_features_are_those_of_the_model(
    kind, tmp_path, tiny_vision, second_vision, tiny_llm, photo_folder, capsys
):
    options, stated = KINDS[kind]
    vision = [str(tiny_vision), str(second_vision)] if kind == "two encoders" else tiny_vision
    if kind == "two encoders":
        from blipren.training.commands.new import NewSettings, run
        from tests.tiny_models import QFORMER

        folder = tmp_path / "model"
        run(NewSettings(out=str(folder), vision=vision, llm=str(tiny_llm), queries=4, qformer=QFORMER))
    else:
        folder = make_model(tmp_path / "model", vision, tiny_llm, **options)
    cache = run_embed(folder, photo_folder, tmp_path / "cache", dtype="float32", batch_size=8)
    assert stated in capsys.readouterr().out
    model, processor = (c.from_pretrained(folder) for c in (BliprenForConditionalGeneration, BliprenProcessor))
    (cached,), _ = open_caches([(cache, 1.0)], model, processor)
    (online,), _ = open_online(
        str(photo_folder), model, processor, TrainSettings(model="m", cache="c", out="o"), augment=False
    )
    assert cached.ids == online.ids and cached.visual_tokens(0) == online.visual_tokens(0) == 4
    ids, mask = torch.tensor([processor.encode_prompt()] * 3), torch.ones(3, len(processor.encode_prompt()))
    with torch.no_grad():
        losses = [
            model(input_ids=ids, attention_mask=mask.long(), **data.inputs([0, 3, 5], None)).logits
            for data in (cached, online)
        ]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


def test_a_cache_of_other_scales_is_refused(tmp_path, tiny_vision, tiny_llm, tiny_model, photo_folder):
    folder = make_model(tmp_path / "model", tiny_vision, tiny_llm, scales=[1, 2])
    cache = run_embed(folder, photo_folder, tmp_path / "cache")
    for other in (tiny_model, make_model(tmp_path / "three", tiny_vision, tiny_llm, scales=[1, 2, 3])):
        model, processor = (c.from_pretrained(other) for c in (BliprenForConditionalGeneration, BliprenProcessor))
        with pytest.raises(UserError, match="scales is \\[1, 2\\] in the cache"):
            cache.check_model(model, processor)
    with pytest.raises(UserError, match="scales"):
        run_embed(tiny_model, photo_folder, tmp_path / "cache")
