"""Maps lie where the encoder looked: hand-set weights, one bright patch in known places, crop and resize included."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ConvNextImageProcessor, ViTImageProcessor

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.evaluation.attention import (
    Grid,
    answer_maps,
    explain,
    feature_norms,
    grid_of,
    query_maps,
    query_statistics,
    seen_image,
    token_maps,
    token_texts,
    word_maps,
)
from blipren.training.evaluation.features import encode_images
from tests.evaluation.conftest import colour_picture, new_model
from tests.tiny_models import make_llm, make_vision, random_image


def dark_photo(size, box) -> Image.Image:
    """A dark photo (width, height) with one bright box (left, top, right, bottom) in pixels."""
    array = np.full((size[1], size[0], 3), 20, dtype=np.uint8)
    left, top, right, bottom = box
    array[top:bottom, left:right] = 250
    return Image.fromarray(array)


@torch.no_grad()
def brightness_model(folder, family: str, image_size: int, patch_size: int, processor_options: dict, select="patches"):
    """A model whose patch features say how bright each patch is, and whose queries attend to the brightest."""
    vision = make_vision(folder / "vision", family, image_size=image_size, patch_size=patch_size)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(vision)
    if processor_options:
        ConvNextImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, **processor_options).save_pretrained(vision)
    else:
        size = {"height": image_size, "width": image_size}
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(vision)
    llm = make_llm(folder / "llm")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    options = {"num_queries": 3, "qformer": sizes | {"cross_attention_frequency": 1}, "vision_feature_select": select}
    torch.manual_seed(0)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(vision, llm, **options)
    keep = {"num_queries": 3, "vision_feature_select": select}
    processor = BliprenProcessor.from_vision_text_pretrained(vision, llm, **keep)
    tower = model.model.vision_tower
    for name, parameter in tower.named_parameters():
        if not any(part in name for part in ("norm", "layer_scale", "lambda")):
            parameter.zero_()  # blocks add nothing to what they are given
    convolution = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d))
    # widths +b and -b beside +1 and -1: the last norm then keeps the order of brightness b
    convolution.weight[0], convolution.weight[1] = 1 / patch_size**2, -1 / patch_size**2
    convolution.bias[2], convolution.bias[3] = 1.0, -1.0
    for layer in model.model.qformer.layers:
        attention = layer.cross_attention
        attention.query.weight.zero_()
        attention.key.weight.zero_()
        attention.query.bias.fill_(6.0)
        attention.key.weight[:, 0] = 1.0
    return model, processor


SETUPS = {
    # family, image size, patch size, image processor, grid, prefix tokens
    "SigLIP-384": ("siglip_vision_model", 384, 14, {}, (27, 27), 0),
    "ViT with a class token": ("vit", 64, 8, {}, (8, 8), 1),
    "DINOv2 with registers": ("dinov2_with_registers", 56, 14, {}, (4, 4), 5),
}


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("select", ["patches", "full"])
def test_the_bright_patch_is_found(tmp_path, name, select):
    family, image_size, patch_size, options, grid, prefix = SETUPS[name]
    model, processor = brightness_model(tmp_path, family, image_size, patch_size, options, select)
    assert tuple(model.config.vision_grid) == grid and model.config.num_prefix_tokens == prefix
    height, width = grid
    for row, column in [(0, 0), (height - 1, 0), (height // 2, width - 2), (1, width - 1)]:
        # the photo is twice as wide as high: the processor squeezes it
        x, y = 2 * patch_size, patch_size
        photo = dark_photo((2 * image_size, image_size), (column * x, row * y, column * x + x, row * y + y))
        features = encode_images(model, processor, [photo], keep_pixels=True)
        maps = query_maps(model, features)
        assert maps.shape == (2, 3, *grid)
        for one in maps.flatten(0, 1):
            assert divmod(int(one.argmax()), width) == (row, column)
        seen = np.asarray(seen_image(processor, features.pixels).convert("L"))
        assert seen.shape == (image_size, image_size)
        assert seen[int((row + 0.5) * patch_size), int((column + 0.5) * patch_size)] > 240
        assert np.median(seen) < 30
        norms = feature_norms(model, features)
        assert norms.shape == grid


def test_crop_and_resize(tmp_path):
    # ConvNeXt's processor: shorter side to 64 / 0.875 = 73, then the middle 64 x 64
    options = {"size": {"shortest_edge": 64}, "crop_pct": 0.875}
    model, processor = brightness_model(tmp_path, "vit", 64, 8, options)
    photo_size, scale = (300, 200), 73 / 200
    for x, y in [(150, 100), (80, 40), (215, 160), (100, 170)]:
        photo = dark_photo(photo_size, (x - 11, y - 11, x + 11, y + 11))
        features = encode_images(model, processor, [photo], keep_pixels=True)
        best = int(query_maps(model, features)[0, 0].argmax())
        row, column = divmod(best, 8)
        seen_x, seen_y = x * scale - (300 * scale - 64) / 2, y * scale - (73 - 64) / 2
        assert abs((column + 0.5) * 8 - seen_x) <= 8 and abs((row + 0.5) * 8 - seen_y) <= 8
        seen = np.asarray(seen_image(processor, features.pixels).convert("L"))
        assert seen.shape == (64, 64) and seen[int(seen_y), int(seen_x)] > 200
    # what the crop takes away is in no map
    outside = encode_images(model, processor, [dark_photo(photo_size, (0, 90, 20, 110))], keep_pixels=True)
    flat = query_maps(model, outside)[0, 0]
    assert float(flat.max() / flat.min()) < 1.01
    assert np.asarray(seen_image(processor, outside.pixels)).max() < 40


def test_words_are_drawn_from_the_bright_patch(tmp_path):
    model, processor = brightness_model(tmp_path, "vit", 64, 8, {})
    features = encode_images(model, processor, [dark_photo((64, 64), (24, 40, 32, 48))], keep_pixels=True)
    ids = list(processor.encode_answer("A dog runs ."))
    assert not any(p.requires_grad for p in model.model.language_model.parameters())
    maps, log_probabilities = token_maps(model, processor, features, 0, None, ids)
    assert maps.shape == (len(ids), 8, 8) and all(p < 0 for p in log_probabilities)
    lit = [m for m in maps if m.max() > 0]
    assert lit and all(divmod(int(m.argmax()), 8) == (5, 3) for m in lit)


def test_a_word_about_two_images_has_a_map_in_each(tmp_path):
    model, processor = brightness_model(tmp_path, "vit", 64, 8, {})
    photos = [dark_photo((64, 64), (24, 40, 32, 48)), dark_photo((64, 64), (48, 8, 56, 16))]
    features = encode_images(model, processor, photos, keep_pixels=True)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which ?"}]}
    ]
    before = processor.encode_conversation(messages, features.visual_tokens(model.config))
    ids = processor.encode_answer("A dog runs .")[:-1]
    maps, log_probabilities = answer_maps(model, features, before, ids)
    assert [m.shape for m in maps] == [(len(ids), 8, 8)] * 2
    largest = torch.stack(maps).amax(dim=(0, 2, 3))
    assert ((largest == 0) | torch.isclose(largest, torch.ones(()))).all() and largest.max() == 1
    for own, place in zip(maps, [(5, 3), (1, 6)]):
        lit = [m for m in own if m.max() > 0]
        assert lit and all(divmod(int(m.argmax()), 8) == place for m in lit)
    few, (log_probability,) = answer_maps(model, features, before, ids, [2])
    assert torch.equal(few[1][0], maps[1][2]) and log_probability == pytest.approx(log_probabilities[2], abs=1e-5)


def test_gradient_is_that_of_the_word(tmp_path):
    model, processor = new_model(tmp_path, connector="patches")
    features = encode_images(model, processor, [random_image(1)], keep_pixels=True)
    ids = list(processor.encode_answer("red"))[:1]
    maps, (log_probability,) = token_maps(model, processor, features, 0, None, ids)
    assert maps.shape == (1, 4, 4)
    # gradient times feature, by finite differences: scale one patch a little
    before, step = processor.encode_prompt(None), 1e-2
    found = []
    for patch in range(16):
        values = []
        for sign in (1, -1):
            patches = features.patches.clone().float()
            patches[0, patch] *= 1 + sign * step
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([before + ids]), patch_features=patches).logits
            values.append(float(logits[0, len(before) - 1].float().log_softmax(-1)[ids[0]]))
        found.append((values[0] - values[1]) / (2 * step))
    expected = torch.tensor(found).clamp(min=0).reshape(4, 4)
    assert torch.allclose(maps[0], expected / expected.max(), atol=0.02)


def test_naflex_has_a_grid_for_each_picture(tmp_path):
    model, processor = new_model(tmp_path, vision="siglip2_vision_model")
    photos = [dark_photo((64, 16), (48, 8, 56, 16)), dark_photo((16, 48), (8, 40, 16, 48))]
    features = encode_images(model, processor, photos, keep_pixels=True)
    for row, photo in enumerate(photos):
        grid = grid_of(model.config, features.pixels, row)
        seen = seen_image(processor, features.pixels, row)
        assert seen.size == (grid.width * 8, grid.height * 8) and (grid.width > grid.height) == (
            photo.width > photo.height
        )
        bright = np.unravel_index(np.asarray(seen.convert("L")).argmax(), (seen.height, seen.width))
        assert bright[0] / seen.height > 0.4 and bright[1] / seen.width > 0.4
        assert query_maps(model, features, row).shape[-2:] == (grid.height, grid.width)
    with pytest.raises(ValueError, match="spatial_shapes are needed"):
        grid_of(model.config)


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"scales": [1, 2], "scale_join": "sequence"}, (8, 8)),
        ({"scales": [1, 2, 3], "scale_join": "sequence"}, (24, 24)),
        ({"tiles": 6}, (8, 12)),
        ({"scales": [1, 2]}, (4, 4)),
    ],
)
def test_pieces_share_one_grid(tmp_path, options, grid):
    """A bright spot of a photo of 96 x 64 has the largest value, at its place, on the grid of the finest pieces."""
    model, processor = new_model(tmp_path, **options)
    photo = dark_photo((96, 64), (60, 20, 66, 26))
    features = encode_images(model, processor, [photo], keep_pixels=True)
    found = grid_of(model.config, features.pixels)
    assert (found.height, found.width) == grid
    # how far the pixels of each patch are from those of a dark photo: its true place, without an encoder's attention
    dark = processor.image_processor(dark_photo((96, 64), (0, 0, 0, 0)), return_tensors="pt")["pixel_values"]
    change = (features.pixels["pixel_values"] - dark).abs().mean(dim=2)[0]  # [pieces, 32, 32]
    patches = change.unflatten(-1, (4, 8)).unflatten(-3, (4, 8)).mean(dim=(-3, -1)).flatten()
    if options.get("scale_join") == "sequence" or "tiles" in options:
        values = found.maps(patches)
        row, column = divmod(int(values.argmax()), grid[1])
        assert abs((row + 0.5) / grid[0] - 23 / 64) < 1 / grid[0]
        assert abs((column + 0.5) / grid[1] - 63 / 96) < 1 / grid[1]
        assert float(values.sum()) == pytest.approx(float(patches[: values.numel() * 4].sum()), rel=1e-5)
    maps = query_maps(model, features)
    assert maps.shape[-2:] == grid and float(maps.sum(dim=(-2, -1)).max()) <= 1 + 1e-5
    seen = np.asarray(seen_image(processor, features.pixels).convert("L"))
    scale = 3 if options.get("scales") == [1, 2, 3] else 2
    assert seen.shape == ((64, 96) if "tiles" in options else (32 * scale, 32 * scale))
    bright = np.unravel_index(seen.argmax(), seen.shape)
    assert abs(bright[0] / seen.shape[0] - 23 / 64) < 0.06 and abs(bright[1] / seen.shape[1] - 63 / 96) < 0.06


def test_mobilenet_maps_lie_on_its_7x7_grid(tmp_path):
    model, processor = new_model(tmp_path, vision="mobilenet_v2")
    assert model.config.vision_grid == [2, 2]
    model.config.vision_grid = [7, 7]
    grid = grid_of(model.config)
    values = torch.zeros(49)
    values[3 * 7 + 5] = 1
    assert divmod(int(grid.maps(values).argmax()), 7) == (3, 5)
    with pytest.raises(ValueError, match="4 tokens are too few for 0 \\+ 7 x 7"):
        grid.maps(torch.zeros(4))


def test_a_convolution_keeps_its_places(shared_data):
    from transformers import AutoImageProcessor, AutoModel

    from blipren.vision_blipren import compute_patch_features

    folder = shared_data("tiny-vision")
    tower = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder)
    grid = Grid(7, 7)
    for row, column in [(1, 1), (5, 2), (3, 5)]:
        box = (column * 32, row * 32, column * 32 + 32, row * 32 + 32)
        photos = [dark_photo((224, 224), box), dark_photo((224, 224), (0, 0, 0, 0))]
        with torch.no_grad():
            features = compute_patch_features(tower, image_processor(photos, return_tensors="pt")["pixel_values"])
        change = grid.maps((features[0] - features[1]).norm(dim=-1))
        found = divmod(int(change.argmax()), 7)
        assert abs(found[0] - row) <= 1 and abs(found[1] - column) <= 1


def test_query_statistics_name_dead_and_identical_queries():
    flat, left, right = torch.full((4, 4), 1 / 16), torch.zeros(4, 4), torch.zeros(4, 4)
    left[:, 0], right[:, 3] = 0.25, 0.25
    found = query_statistics(torch.stack([flat, left, right, left])[None])
    assert found.dead == [0] and found.identical == [(1, 3)]
    assert found.entropy[0] == pytest.approx(1) and found.entropy[1] == pytest.approx(0.5)
    assert found.overlap[1][2] == pytest.approx(0) and found.overlap[0][1] == pytest.approx(0.25)
    assert query_statistics(left[None, None]).mean_overlap == 1.0


def test_tokens_join_to_words(seeing, tmp_path):
    from blipren.training.evaluation.generation import load_model

    model, processor = load_model(str(seeing), "cpu")
    ids = list(processor.encode_answer("A déjà-vu picture ."))[:-1]
    texts = token_texts(processor, ids)
    assert "".join(texts).strip() == "A déjà-vu picture ."
    words, maps = word_maps(texts, torch.rand(len(texts), 4, 4))
    assert words == ["A", "déjà-vu", "picture", "."] and maps.shape == (4, 4, 4)
    shown = explain(model, processor, colour_picture(2), max_new_tokens=24)
    assert shown.caption == "A blue picture ." and shown.words == ["A", "blue", "picture", "."]
    assert shown.queries.shape[1:] == (4, 4, 4) and shown.seen.size == (32, 32) and shown.router is None
    empty = explain(model, processor, colour_picture(2), caption="")
    assert empty.words == [] and len(empty.word_maps) == 0
