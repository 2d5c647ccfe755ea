"""Scales, tiles and two encoders: joined features against plain references, pixels against cached features."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import QFORMER, random_image
from transformers import AutoImageProcessor, AutoModel, pipeline
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

from blipren import BliprenConfig, BliprenForConditionalGeneration, BliprenForImageTextRetrieval, BliprenProcessor
from blipren.pieces_blipren import choose_tile_grid, with_pieces
from blipren.pipeline_blipren import BliprenImageToTextPipeline

CAPTIONS = ["A dog runs .", "Two children play .", "A man ."]
PHOTOS = [random_image(i, size) for i, size in enumerate([(90, 70), (64, 64), (50, 120)])]


@pytest.fixture(scope="module")
def make(bases):
    """Function (vision families, **options) -> model and processor."""

    def build(*families, llm="llama", processor_options=None, **options):
        vision = [bases("vision", family) for family in families]
        shared = {k: options[k] for k in ("connector", "scales", "scale_join", "tiles") if k in options}
        common = (vision if len(vision) > 1 else vision[0], bases("llm", llm))
        model = BliprenForConditionalGeneration.from_vision_text_pretrained(
            *common, num_queries=4, qformer=QFORMER, dtype="float32", **options
        )
        return model, BliprenProcessor.from_vision_text_pretrained(*common, num_queries=4, **shared)

    return build


def reference_features(bases, family: str, image: Image.Image, scale: int) -> torch.Tensor:
    """Patch features `(rows, columns, width)` of an image at one scale, piece by piece, put together."""
    folder = bases("vision", family)
    tower = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder, size={"height": 32 * scale, "width": 32 * scale})(
        image, return_tensors="pt"
    )["pixel_values"]
    rows = []
    with torch.no_grad():
        for top in range(0, 32 * scale, 32):
            pieces = [
                tower(pixels[:, :, top : top + 32, left : left + 32]).last_hidden_state[0, -16:].view(4, 4, -1)
                for left in range(0, 32 * scale, 32)
            ]
            rows.append(torch.cat(pieces, dim=1))
    return torch.cat(rows, dim=0)


@pytest.mark.parametrize("family", ["siglip_vision_model", "dinov2"])
def test_channels_of_scales_equal_a_plain_reference(make, bases, family):
    model, processor = make(family, scales=[1, 2, 3])
    features = model.encode_images(**processor.image_processor(PHOTOS[0], return_tensors="pt"))
    expected = []
    for scale in (1, 2, 3):
        whole = reference_features(bases, family, PHOTOS[0], scale)  # [4 * scale, 4 * scale, width]
        cells = whole.unflatten(0, (4, scale)).unflatten(2, (4, scale))
        expected.append(cells.mean(dim=(1, 3)).flatten(0, 1))
    # the fast resize differs from Pillow's by one level of 255
    torch.testing.assert_close(features[0], torch.cat(expected, dim=-1), atol=0.02, rtol=0)
    assert model.config.vision_hidden_size == 3 * 32
    assert model.config.num_visual_tokens == 4


def test_sequence_of_scales_is_the_view_and_its_crops(make, bases):
    model, processor = make("siglip_vision_model", scales=[1, 2], scale_join="sequence")
    pixels = processor.image_processor(PHOTOS[0], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 5, 3, 32, 32)
    features = model.encode_images(pixels)
    assert features.shape == (1, 5 * 16, 32)
    for piece in range(5):
        alone = model.model.vision_tower(pixels[:, piece]).last_hidden_state
        torch.testing.assert_close(features[:, 16 * piece : 16 * (piece + 1)], alone, atol=1e-5, rtol=1e-5)
    # each crop has an embedding of its own: exchanging two changes what the queries read
    embeddings = model.model.qformer.piece_embeddings.weight
    assert embeddings.shape == (5, 32) and embeddings.requires_grad
    swapped = features[:, [*range(16), *range(32, 48), *range(16, 32), *range(48, 80)]]

    @torch.no_grad()
    def difference():
        first, second = (model.get_image_features(patch_features=10 * f).pooler_output[0] for f in (features, swapped))
        return (first - second).abs().max()

    torch.manual_seed(0)
    torch.nn.init.normal_(embeddings, std=10)
    with_embeddings = difference()
    torch.nn.init.zeros_(embeddings)
    assert with_embeddings > 100 * difference()


def test_one_scale_gives_the_same_numbers_as_none(make):
    plain, with_scale = make("siglip_vision_model"), make("siglip_vision_model", scales=[1])
    pixels = [
        processor.image_processor(PHOTOS, return_tensors="pt")["pixel_values"] for _, processor in (plain, with_scale)
    ]
    assert torch.equal(*pixels)
    assert torch.equal(*(model.encode_images(p) for (model, _), p in zip((plain, with_scale), pixels)))


def test_two_encoders_on_one_grid(make, bases):
    model, processor = make("siglip_vision_model", "convnext")
    inputs = processor.image_processor(PHOTOS[:1], return_tensors="pt")
    assert inputs["pixel_values"].shape[-1] == 32 and inputs["second_pixel_values"].shape[-1] == 64
    features = model.encode_images(**inputs)
    first = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    second = model.model.second_vision_tower(inputs["second_pixel_values"]).last_hidden_state  # [1, 32, 2, 2]
    second = F.interpolate(second, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, torch.cat([first, second], dim=-1), atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in model.model.second_vision_tower.parameters())
    model.train()
    assert not model.model.second_vision_tower.training
    own = AutoImageProcessor.from_pretrained(bases("vision", "convnext"))(PHOTOS[0], return_tensors="pt")
    torch.testing.assert_close(inputs["second_pixel_values"], own["pixel_values"], atol=0.02, rtol=0)


KINDS = {
    "channels": (("siglip_vision_model",), {"scales": [1, 2]}),
    "sequence": (("clip_vision_model",), {"scales": [1, 2], "scale_join": "sequence"}),
    "tiles": (("siglip_vision_model",), {"tiles": 4}),
    "tiles as patches": (("siglip_vision_model",), {"tiles": 3, "connector": "patches", "projector": "mlp2"}),
    "sequence as patches": (
        ("siglip_vision_model",),
        {"scales": [1, 2], "scale_join": "sequence", "connector": "patches", "projector": "mlp2"},
    ),
    "two encoders": (("siglip_vision_model", "dinov2"), {}),
    "two encoders with scales": (("siglip_vision_model", "dinov2"), {"scales": [1, 2]}),
    "two encoders with tiles": (("siglip_vision_model", "dinov2"), {"tiles": 2}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_cache_batches_and_checkpoints_agree(make, kind, tmp_path):
    families, options = KINDS[kind]
    model, processor = make(*families, **options)
    batch = processor(images=[[p] for p in PHOTOS], return_tensors="pt")
    pixels = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**batch).logits
        mask = {"patch_attention_mask": pixels["pixel_attention_mask"]} if "pixel_attention_mask" in pixels else {}
        texts = {k: batch[k] for k in ("input_ids", "attention_mask")}
        cached = model(**texts, patch_features=model.encode_images(**pixels), **mask).logits
    torch.testing.assert_close(logits, cached, atol=1e-5, rtol=0)
    # a padded batch generates what single prompts generate
    together = model.generate(**batch, max_new_tokens=5, min_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    for photo, row in zip(PHOTOS, together):
        alone = processor(images=photo, return_tensors="pt")
        assert torch.equal(
            model.generate(**alone, max_new_tokens=5, min_new_tokens=5)[0, alone["input_ids"].shape[1] :], row
        )
    # a bridge finds its encoders, and the processor cuts the same pieces after saving and in another process
    model.save_bridge(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = (c.from_pretrained(tmp_path) for c in (BliprenForConditionalGeneration, BliprenProcessor))
    repeated = its_processor(images=[[p] for p in PHOTOS], return_tensors="pt")
    sent = pickle.loads(pickle.dumps(its_processor.image_processor))(PHOTOS, return_tensors="pt")
    assert repeated.keys() == batch.keys()
    for name, value in batch.items():
        assert torch.equal(value, repeated[name])
        assert name not in sent or torch.equal(value, sent[name])
    with torch.no_grad():
        assert torch.equal(again.eval()(**repeated).logits, logits)
    assert its_processor.image_processor.to_dict() == processor.image_processor.to_dict()


@pytest.mark.parametrize("kind", ["tiles", "two encoders with scales"])
def test_pipelines_take_images_in_pieces(make, kind):
    families, options = KINDS[kind]
    model, processor = make(*families, **options)
    captioner = BliprenImageToTextPipeline(model=model, processor=processor, max_new_tokens=4)
    captions = [captioner(photo) for photo in PHOTOS]
    assert captioner(PHOTOS, batch_size=2) == captions
    chat = pipeline("image-text-to-text", model=model, processor=processor, max_new_tokens=4)
    answer = chat(images=PHOTOS[0], text="What is it ?", return_full_text=False)[0]["generated_text"]
    inputs = processor(images=PHOTOS[0], text="What is it ?", return_tensors="pt")
    own = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert answer.strip() == processor.decode_answer(own)


def test_bridge_of_two_encoders_pins_both(make, tmp_path):
    model, _ = make("siglip_vision_model", "dinov2")
    assert set(model.config.base_models) == {"vision", "second_vision", "llm"}
    model.config.base_models["second_vision"]["sampled_sha256"] = "0" * 64
    model.save_bridge(tmp_path)
    with pytest.raises(ValueError, match="second_vision model .* whose weights differ"):
        BliprenForConditionalGeneration.from_pretrained(tmp_path)


def test_stage_1_has_both_encoders_and_piece_embeddings(make, tmp_path):
    model, processor = make("siglip_vision_model", "dinov2", scales=[1, 2], scale_join="sequence")
    text = {"vocab_size": 50, "pad_token_id": 0}
    aligned = BliprenForImageTextRetrieval.from_generator(model, text).eval()
    inputs = processor.image_processor(PHOTOS[:2], return_tensors="pt")
    aligned.save_bridge(tmp_path)
    again = BliprenForImageTextRetrieval.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(aligned.get_image_embeddings(**inputs), again.get_image_embeddings(**inputs))
    moved = aligned.state_dict()["model.qformer.piece_embeddings.weight"]
    assert torch.equal(moved, model.model.qformer.piece_embeddings.weight)


@pytest.mark.parametrize(
    ("size", "tiles", "grid"),
    [
        ((100, 100), 4, (2, 2)),
        ((400, 100), 4, (1, 4)),
        ((100, 300), 6, (3, 1)),
        ((120, 80), 6, (2, 3)),
        ((100, 100), 2, (1, 1)),
    ],
)
def test_grid_of_tiles_fits_the_shape(size, tiles, grid):
    assert choose_tile_grid(*size, tiles) == grid


def test_tiles_of_an_image(make):
    _, processor = make("siglip_vision_model", tiles=4)
    striped = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8) * 60, 32)[None].repeat(32, 0)).convert("RGB")
    inputs = processor.image_processor([striped, random_image(0, (32, 32))], return_tensors="pt")
    assert inputs["spatial_shapes"].tolist() == [[1, 4], [2, 2]]
    assert inputs["pixel_attention_mask"].sum(1).tolist() == [80, 80]
    tiles = (inputs["pixel_values"][0, 1:] + 1) * 127.5
    assert [round(float(t.mean())) for t in tiles] == [0, 60, 120, 180]


def test_images_of_differing_lengths_are_no_model_for_vllm(make):
    _, processor = make("siglip_vision_model", tiles=4, connector="patches")
    with pytest.raises(ValueError, match="serve a model with a Q-Former"):
        processor._get_num_multimodal_tokens(image_sizes=[(40, 30)])


def test_scales_of_an_image_processor_that_gives_arrays_alone():
    """MobileNetV2's: the base scale is the plain processor's output, the larger one its output at twice the size."""
    settings = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    plain, larger = (
        MobileNetV2ImageProcessorPil(**(settings | {"size": {"height": s, "width": s}})) for s in (32, 64)
    )
    processor = MobileNetV2ImageProcessorPil(**settings)
    processor.scales = [1, 2]
    pixels = with_pieces(processor)(PHOTOS, return_tensors="np")["pixel_values"]
    assert pixels.shape == (3, 5, 3, 32, 32)
    assert np.array_equal(pixels[:, 0], plain(PHOTOS, return_tensors="np")["pixel_values"])
    whole = larger(PHOTOS, return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels[:, 1], whole[:, :, :32, :32]) and np.array_equal(pixels[:, 4], whole[:, :, 32:, 32:])
    tiled = MobileNetV2ImageProcessorPil(**settings)
    tiled.tiles, tiled.tile_patches = 2, 1
    with pytest.raises(ValueError, match="tiles need a mask: use scales"):
        with_pieces(tiled)(PHOTOS)


def test_what_does_not_fit_together_is_refused(make):
    with pytest.raises(ValueError, match="ascend from 1"):
        make("siglip_vision_model", scales=[2, 4])
    with pytest.raises(ValueError, match="at least 2, with no scale"):
        make("siglip_vision_model", scales=[1, 2], tiles=4)
    with pytest.raises(ValueError, match="fixed patch grid"):
        make("siglip2_vision_model", scales=[1, 2])
    with pytest.raises(ValueError, match="need vision_feature_select patches"):
        make("clip_vision_model", scales=[1, 2], vision_feature_select="full")
    with pytest.raises(ValueError, match="3 vision encoders"):
        make("siglip_vision_model", "dinov2", "vit")
    model, processor = make("siglip_vision_model", "dinov2")
    with pytest.raises(ValueError, match="give second_pixel_values"):
        model.encode_images(processor.image_processor(PHOTOS[0], return_tensors="pt")["pixel_values"])


def test_configs_of_earlier_versions_load():
    config = BliprenConfig().to_dict()
    for name in ("vision_scales", "vision_join", "vision_tiles", "second_vision_config"):
        config.pop(name)
    assert BliprenConfig.from_dict(config).vision_scales == [1]
