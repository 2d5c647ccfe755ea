"""From a data set to a feature cache and back: what is stored, how it is read, when it is refused."""

import json

import datasets
import numpy as np
import pytest
import torch

from blipren.training.commands.align import AlignSettings
from blipren.training.commands.align import run as align
from blipren.training.commands.train import TrainSettings
from blipren.training.commands.train import run as train
from blipren.training.data.cache import FeatureCache
from blipren.training.data.cache.engines import local
from blipren.training.data.cache.shards import CacheDamage
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError
from tests.data.tools import encoded, make_model, picture, run_embed, write_folder
from tests.tiny_models import make_llm, make_vision


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_checkpoint(str(tiny_model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty images, split by a column, two captions each."""
    path = tmp_path_factory.mktemp("photos")
    splits = ["train"] * 28 + ["validation"] * 6 + ["test"] * 6
    rows = [
        {"file_name": f"{i:02d}.png", "captions": [f"picture {i} of many", f"number {i} in colour"], "split": split}
        for i, split in enumerate(splits)
    ]
    return write_folder(path, rows, {row["file_name"]: encoded(picture(i), "PNG") for i, row in enumerate(rows)})


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_model, folder):
    return run_embed(tiny_model, folder, tmp_path_factory.mktemp("cache") / "c", dtype="float32")


def pixels_of(processor, row):
    return processor.image_processor(images=[row.load()], return_tensors="pt")["pixel_values"]


def test_load_from_disk_opens_it_with_every_row_once(cache, folder):
    data = datasets.load_from_disk(str(cache.folder))
    assert list(data) == ["train", "validation", "test"]
    assert {split: len(rows) for split, rows in data.items()} == {"train": 28, "validation": 6, "test": 6}
    row = data["test"][2]
    assert (row["id"], row["num_patches"], row["width"], row["height"]) == ("36.png", 16, 48, 40)
    assert row["prompts"] == [None, None] and row["answers"] == ["picture 36 of many", "number 36 in colour"]
    assert len(row["patch_features"]) == 16 * 32
    assert cache.counts["rows"] == cache.counts["cached"] == 40 and cache.counts["rejected"] == 0


def test_features_are_what_the_encoder_gives(cache, folder, model):
    model, processor = model
    row = list(open_rows(str(folder)))[5]
    expected = model.encode_images(pixels_of(processor, row))[0]
    features, mask = cache.patch_features("train", [5, 0, 5])
    assert features.shape == (3, 16, 32) and mask is None
    torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(features[0], features[2]) and not torch.equal(features[0], features[1])
    plain = datasets.load_from_disk(str(cache.folder))["train"].with_format("numpy")[5]["patch_features"]
    assert np.array_equal(plain.reshape(16, 32), features[0].numpy())


def test_workers_give_the_same_cache(tmp_path, tiny_model, folder, cache):
    with_workers = run_embed(tiny_model, folder, tmp_path / "c", dtype="float32", workers=2)
    assert with_workers.info["content_hash"] == cache.info["content_hash"]


@pytest.mark.parametrize("dtype, tolerance", [("float16", 1e-3), ("int8", 1e-2)])
def test_smaller_types_stay_close(tmp_path, tiny_model, folder, cache, dtype, tolerance):
    small = run_embed(tiny_model, folder, tmp_path / "c", dtype=dtype)
    exact, _ = cache.patch_features("train", range(28))
    features, _ = small.patch_features("train", range(28))
    assert features.dtype == torch.float32
    error = (features - exact).abs().amax(dim=-1) / exact.abs().amax(dim=-1)
    assert 0 < error.max() < tolerance
    row = datasets.load_from_disk(str(small.folder))["train"][0]
    if dtype == "int8":
        rebuilt = np.array(row["patch_features"]).reshape(16, 32) * np.array(row["scale"])[:, None]
        np.testing.assert_allclose(rebuilt, features[0].numpy(), rtol=1e-6)
        assert small.info["bytes"] < 0.6 * cache.info["bytes"]


def test_views_are_crops_that_repeat(tmp_path, tiny_model, folder, cache):
    first = run_embed(tiny_model, folder, tmp_path / "a", dtype="float32", views=3)
    second = run_embed(tiny_model, folder, tmp_path / "b", dtype="float32", views=3, workers=1)
    assert first.info["content_hash"] == second.info["content_hash"] and first.views == 3
    plain, _ = cache.patch_features("train", [7, 8])
    views = [first.patch_features("train", [7, 8], views=[v, v])[0] for v in range(3)]
    torch.testing.assert_close(views[0], plain, atol=1e-5, rtol=1e-5)
    assert (views[1] - plain).abs().max() > 1e-2 and (views[1] - views[2]).abs().max() > 1e-2
    mixed, _ = first.patch_features("train", [7, 8], views=[2, 1])
    assert torch.equal(mixed[0], views[2][0]) and torch.equal(mixed[1], views[1][1])
    assert len(datasets.load_from_disk(str(first.folder))["train"][0]["patch_features"]) == 3 * 16 * 32


@pytest.mark.parametrize("views", [1, 2])
def test_encoders_whose_images_differ_in_patches(tmp_path, tiny_llm, folder, views):
    vision = make_vision(tmp_path / "vision", "siglip2_vision_model")
    naflex = make_model(tmp_path / "model", vision, tiny_llm)
    model, processor = load_checkpoint(str(naflex))
    rows = [{"file_name": f"{i}.png", "caption": f"one {i} of three"} for i in range(3)]
    sizes = [(64, 16), (32, 32), (16, 48)]
    write_folder(tmp_path / "d", rows, {f"{i}.png": encoded(picture(i, size), "PNG") for i, size in enumerate(sizes)})
    options = {"validation_share": 0.0, "test_share": 0.0, "views": views, "dtype": "int8"}
    cache = run_embed(naflex, tmp_path / "d", tmp_path / "c", **options)
    features, mask = cache.patch_features("train", [0, 1, 2])
    assert mask.sum(dim=1).tolist() == list(cache.split("train")["num_patches"])
    assert len(set(mask.sum(dim=1).tolist())) > 1
    images = [row.load() for row in open_rows(str(tmp_path / "d"))]
    inputs = processor.image_processor(images=images, return_tensors="pt")
    expected = model.encode_images(
        **{k: inputs[k] for k in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
    )
    for i in range(3):
        count = int(mask[i].sum())
        torch.testing.assert_close(features[i, :count], expected[i, :count], atol=0.05, rtol=0.02)
        assert not features[i, count:].any()


def test_token_ids_are_the_processors_and_are_kept(cache, model):
    _, processor = model
    table = cache.tokens("train", processor)
    texts = cache.split("train")["answers"]
    assert len(table) == 28
    assert [ids for _, ids in table.answers(3)] == [processor.encode_answer(text) for text in texts[3]]
    assert table.answers(3)[0][0] is None
    folders = list((cache.folder / "tokens").glob("*/train/data.arrow"))
    changed = folders[0].stat().st_mtime_ns
    again = FeatureCache.open(cache.folder).tokens("train", processor)
    assert np.array_equal(again.ids, table.ids) and folders[0].stat().st_mtime_ns == changed
    stored = datasets.load_from_disk(str(folders[0].parent))
    assert stored[3]["id"] == "03.png" and stored[3]["answer_ids"] == [ids for _, ids in table.answers(3)]
    processor.answer_start, before = "  ", processor.answer_start
    try:
        cache.tokens("train", processor)
    finally:
        processor.answer_start = before
    assert len(list((cache.folder / "tokens").glob("*/train/data.arrow"))) == 2


def test_damaged_token_ids_are_found(tmp_path, tiny_model, folder, model):
    cache = run_embed(tiny_model, folder, tmp_path / "c", limit=10)
    cache.tokens("train", model[1])
    file = next((cache.folder / "tokens").glob("*/train/data.arrow"))
    flip(file, file.stat().st_size // 2)
    with pytest.raises(CacheDamage, match="is damaged; remove"):
        cache.tokens("train", model[1])


def test_special_tokens_in_captions_stay_text(tmp_path, tiny_model, model):
    _, processor = model
    rows = [{"file_name": "a.png", "captions": ["a <image> in a dog", "the end</s> of <s> it"], "split": "train"}]
    write_folder(tmp_path / "d", rows, {"a.png": encoded(picture(0), "PNG")})
    cache = run_embed(tiny_model, tmp_path / "d", tmp_path / "c")
    assert cache.split("train")[0]["answers"] == rows[0]["captions"]
    for _, ids in cache.tokens("train", processor).answers(0):
        special = {processor.image_token_id, *processor.tokenizer.all_special_ids}
        assert [token for token in ids if token in special] == [processor.answer_end_id] and ids[-1] in special


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_a_flipped_byte_is_found_when_read_and_by_verify(tmp_path, tiny_model, folder, capsys):
    from blipren.training.commands.embed import EmbedSettings
    from blipren.training.commands.embed import run as embed

    cache = run_embed(tiny_model, folder, tmp_path / "c", rows_per_shard=40)
    settings = EmbedSettings(model=str(tiny_model), dataset=str(folder), cache=str(tmp_path / "c"), verify=True)
    assert not embed(settings)
    file = cache.folder / "train" / cache.info["shards"]["train"][0]["file"]
    flip(file, file.stat().st_size - 2000)
    with pytest.raises(CacheDamage, match="data-00000.arrow is damaged: megabyte 0"):
        FeatureCache.open(cache.folder).patch_features("train", [27])
    assert torch.isfinite(FeatureCache.open(cache.folder).patch_features("validation", [0])[0]).all()
    assert embed(settings) == 1 and "data-00000.arrow is damaged" in capsys.readouterr().out
    file.unlink()
    with pytest.raises(CacheDamage, match="missing from the cache"):
        FeatureCache.open(cache.folder).patch_features("train", [0])


def test_a_model_with_another_encoder_is_refused_by_field(cache, tmp_path, tiny_llm, model):
    model, processor = model
    cache.check_model(model, processor)
    other = make_model(tmp_path / "other", make_vision(tmp_path / "v", seed=1), tiny_llm)
    with pytest.raises(UserError, match="vision_weights is"):
        cache.check_model(*load_checkpoint(str(other)))
    processor.image_processor.image_mean, before = [0.4] * 3, processor.image_processor.image_mean
    with pytest.raises(UserError, match="preprocessing.image_mean is"):
        cache.check_model(model, processor)
    processor.image_processor.image_mean = before
    model.config.vision_feature_layer, before = -2, model.config.vision_feature_layer
    with pytest.raises(UserError, match="vision_feature_layer is -1 in the cache and -2"):
        cache.check_model(model, processor)
    model.config.vision_feature_layer = before
    model.model.vision_tower.half()
    with pytest.raises(UserError, match="encoder_dtype is 'float32' in the cache and 'float16'"):
        cache.check_model(model, processor)
    model.model.vision_tower.float()
    base = dict(model.config.base_models)
    cache.fingerprint["encoder"]["vision_revision"] = "abc"
    model.config.base_models = base | {"vision": base["vision"] | {"revision": "def"}}
    with pytest.raises(UserError, match="vision_revision is 'abc' in the cache and 'def'"):
        cache.check_model(model, processor)
    cache.fingerprint["encoder"]["vision_revision"] = None
    model.config.base_models = base


def test_a_folder_embedded_otherwise_is_refused_by_field(tmp_path, tiny_model, folder, capsys):
    run_embed(tiny_model, folder, tmp_path / "c", limit=10)
    run_embed(tiny_model, folder, tmp_path / "c", limit=10)
    assert "nothing to embed" in capsys.readouterr().out
    with pytest.raises(UserError, match="storage.dtype = 'float16', and now it is 'float32'"):
        run_embed(tiny_model, folder, tmp_path / "c", limit=10, dtype="float32")
    with pytest.raises(UserError, match="source.limit"):
        run_embed(tiny_model, folder, tmp_path / "c", limit=11)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and is not a feature cache .*thesis.txt"):
        run_embed(tiny_model, folder, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_another_filter_rebuilds_texts_and_leaves_features(tmp_path, tiny_model, model):
    captions = ["one two three four five", "a cat", "cat"]
    rows = [{"file_name": f"{i}.png", "captions": captions[i % 2 :], "split": "train"} for i in range(4)]
    rows.append({"file_name": "4.png", "captions": ["cat"], "split": "train"})
    write_folder(tmp_path / "d", rows, {f"{i}.png": encoded(picture(i), "PNG") for i in range(5)})
    cache = run_embed(tiny_model, tmp_path / "d", tmp_path / "c")
    shards = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*/data-*.arrow")}
    before = cache.tokens("train", model[1])
    assert len(cache.split("train")) == 5 and len(before.starts) - 1 == 11
    strict = run_embed(tiny_model, tmp_path / "d", tmp_path / "c", min_words=2)
    assert {path: path.stat().st_mtime_ns for path in cache.folder.glob("*/data-*.arrow")} == shards
    assert [row["answers"] for row in strict.split("train")] == [captions[i % 2 : 2] for i in range(4)]
    assert len(strict.tokens("train", model[1])) == 4
    rejected = [
        json.loads(line) for line in (strict.folder / strict.info["captions"]["folder"] / "rejected.jsonl").open()
    ]
    assert sum(line["kind"] == "row" for line in rejected) == 1 and len(rejected) == 6
    assert torch.equal(strict.patch_features("train", [3])[0], cache.patch_features("train", [3])[0])
    back = run_embed(tiny_model, tmp_path / "d", tmp_path / "c")
    assert len(back.split("train")) == 5 and np.array_equal(back.tokens("train", model[1]).ids, before.ids)


def test_dry_run_shows_and_writes_nothing(tmp_path, tiny_model, folder, capsys):
    from blipren.training.commands.embed import EmbedSettings
    from blipren.training.commands.embed import run as embed

    path = tmp_path / "c"
    options = {"model": str(tiny_model), "dataset": str(folder), "cache": str(path), "workers": 0, "min_words": 5}
    assert embed(EmbedSettings(**options, dry_run=True)) is None
    out = capsys.readouterr().out
    assert "min_words" in out and "of 40 rows 0 would be cached" in out and not path.exists()


@pytest.mark.parametrize(
    "value, message", [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (1e5, "--dtype float32")]
)
def test_bad_features_name_the_row(tmp_path, tiny_model, folder, monkeypatch, value, message):
    from blipren import BliprenForConditionalGeneration

    original = BliprenForConditionalGeneration.encode_images
    calls = []

    def spoiled(self, *args, **kwargs):
        features = original(self, *args, **kwargs).clone()
        calls.append(len(features))
        if len(calls) == 4:  # the first one measures a blank image
            features[2, 3, 4] = value
        return features

    monkeypatch.setattr(BliprenForConditionalGeneration, "encode_images", spoiled)
    with pytest.raises(UserError, match=f"row 10.png: .*{message}"):
        run_embed(tiny_model, folder, tmp_path / "c")
    assert not (tmp_path / "c" / "cache.json").exists()
    monkeypatch.undo()
    assert run_embed(tiny_model, folder, tmp_path / "c").counts["cached"] == 40


def test_near_duplicates_of_evaluation_images_leave_training(tmp_path, tiny_model, capsys):
    """The same bytes, a recompressed and a resized copy; a mirrored and a differently coloured picture are others."""
    from PIL import ImageOps

    base = picture(0, (96, 80))
    other = base.copy()
    other.paste((255, 0, 255), (30, 30, 50, 50))
    files = {
        "held.png": (encoded(base, "PNG"), "test"),
        "same.png": (encoded(base, "PNG"), "train"),
        "again.jpg": (encoded(base, "JPEG", quality=60), "train"),
        "small.png": (encoded(base.resize((60, 50)), "PNG"), "train"),
        "mirror.png": (encoded(ImageOps.mirror(base), "PNG"), "train"),
        "object.png": (encoded(other, "PNG"), "train"),
        "valid.png": (encoded(picture(1), "PNG"), "validation"),
    }
    rows = [
        {"file_name": name, "caption": f"this is {name[:-4]}", "split": split} for name, (_, split) in files.items()
    ]
    write_folder(tmp_path / "d", rows, {name: data for name, (data, _) in files.items()})
    cache = run_embed(tiny_model, tmp_path / "d", tmp_path / "c", rows_per_shard=3)
    assert set(cache.split("train")["id"]) == {"mirror.png", "object.png"}
    lines = [json.loads(line) for line in (cache.folder / "rejected.jsonl").open()]
    assert {line["id"]: line["reason"] for line in lines} == {
        "same.png": "same_image", "again.jpg": "near_duplicate", "small.png": "near_duplicate",
    }  # fmt: skip
    assert cache.counts["rejected"] == 3 and cache.counts["cached"] == 4
    assert cache.counts["duplicates"]["near_duplicates_in_training_and_evaluation"] == 2
    assert "near duplicates in training and evaluation: 2" in capsys.readouterr().out
    assert len(cache.patch_features("train", [0, 1])[0]) == 2 and not cache.verify()
    kept = run_embed(tiny_model, tmp_path / "d", tmp_path / "k", near_duplicates="keep")
    assert kept.num_rows("train") == 5 and kept.counts["duplicates"]["same_image_in_training_and_evaluation"] == 1


def test_another_language_model_reuses_the_features(tmp_path, tiny_model, tiny_vision, folder, capsys):
    cache = run_embed(tiny_model, folder, tmp_path / "c", limit=12)
    shards = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*/data-*.arrow")}
    chat = make_model(tmp_path / "chat", tiny_vision, make_llm(tmp_path / "llm", "qwen2", chat=True))
    again = run_embed(chat, folder, tmp_path / "c", limit=12)
    assert "nothing to embed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in cache.folder.glob("*/data-*.arrow")} == shards
    assert len(again.info["tokens"]) == 2
    assert len({prints["template"] for prints in again.info["tokens"].values()}) == 2
    _, processor = load_checkpoint(str(chat))
    text = again.split("train")[4]["answers"][1]
    assert again.tokens("train", processor).answers(4)[1] == (None, processor.encode_answer(text))


@pytest.fixture
def cache_without_texts(tmp_path, tiny_model, photo_folder, monkeypatch):
    """What earlier versions wrote of rows with a conversation alone."""
    add_row = local.add_row

    def add_without_texts(unit, item, *stored):
        item.row.prompts, item.row.answers = [], []
        item.prompts, item.answers = [], []
        unit.add(item, *stored)

    monkeypatch.setattr(local, "add_row", add_without_texts)
    cache = run_embed(tiny_model, photo_folder, tmp_path / "c")
    monkeypatch.setattr(local, "add_row", add_row)
    return cache


def test_a_cache_without_texts_is_refused_before_a_model_is_loaded(cache_without_texts, tmp_path):
    folder = str(cache_without_texts.folder)
    nothing = "neither caption nor answer for 8 of the 8 images of its train split; embed the data set again"
    with pytest.raises(UserError, match=nothing):
        train(TrainSettings(model="user/no-model", cache=folder, out=str(tmp_path / "out"), device="cpu"))
    with pytest.raises(UserError, match="no caption in its train split: stage 1 learns from captions"):
        align(AlignSettings(model="user/no-model", cache=folder, out=str(tmp_path / "out"), device="cpu"))
