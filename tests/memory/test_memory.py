"""A memory: neighbours, predicted scores, guidance, and captions through `generate`."""

import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from blipren import BliprenForConditionalGeneration, BliprenProcessor, memory_blipren
from blipren.consensus_blipren import (
    hash_captions,
    hash_letters,
    letters_of_tokens,
)
from blipren.memory_blipren import BliprenMemory, MemorySettings
from blipren.memory_generation_blipren import HALF_DOUBTED, doubt_weight, masked_patches, pool_patches
from blipren.modeling_blipren import CACHE
from blipren.ranked_generation_blipren import Candidate
from blipren.training.cli import main
from blipren.training.conversation.conversation import Conversation
from blipren.training.data.cache import FeatureCache
from blipren.training.memory.build import choose_copy_penalty, embed_rows, memory_info, read_cache
from tests.captioning.conftest import seeing  # noqa: F401
from tests.data.tools import run_embed
from tests.evaluation.conftest import colour_picture
from tests.tiny_models import random_image


def random_memory(entries: int = 30, width: int = 8, settings: MemorySettings | None = None) -> BliprenMemory:
    generator = torch.Generator().manual_seed(0)
    texts = {
        "id": [f"{i}.jpg" for i in range(entries)],
        "image_hash": [f"hash {i}" for i in range(entries)],
        "captions": [[f"caption {i}"] for i in range(entries)],
        "tokens": [[[i + 3, i + 4]] for i in range(entries)],
    }
    embeddings = torch.randn(entries, width, generator=generator)
    info = {"encoder": {}, "language_model": {}, "prompts": [[1]], "end": 2}
    return BliprenMemory.build(embeddings, texts, info, letters_of_tokens([f"w{i}" for i in range(300)]), settings)


def raw(memory: BliprenMemory) -> torch.Tensor:
    return memory.embeddings.float() * memory.statistics["std"] + memory.statistics["mean"]


def test_neighbours_are_the_nearest_without_the_image_itself(monkeypatch):
    memory = random_memory()
    queries, stored = raw(memory), memory.embeddings.float()
    expected = torch.cdist(stored, stored).topk(5, largest=False).indices
    monkeypatch.setattr(memory_blipren, "BLOCK", 7)
    found = memory.find(queries, 5)
    assert torch.equal(found.indices, expected) and found.similarities[:, 0] == pytest.approx(torch.ones(30), abs=1e-3)
    own = torch.arange(30)[:, None]
    names = memory.texts["id"].to_pylist()
    left_out = memory.find(queries, 4, exclude=names)
    assert not (left_out.indices == own).any() and torch.equal(left_out.indices, expected[:, 1:])
    # a near duplicate under another name is none either
    twin = {name: [f"twin {name}"] for name in ("id", "image_hash")} | {"captions": [["x"]], "tokens": [[[3]]]}
    doubled = memory.extend(queries[:1] + 1e-3, twin)
    assert doubled.find(queries[:1], 2).indices.tolist() == [[0, 30]] or len(doubled) == 31
    assert not set(doubled.find(queries[:1], 5, exclude=["0.jpg"]).indices[0].tolist()) & {0, 30}
    doubled.leave_out_duplicates = True
    assert not set(doubled.find(queries[:1], 5).indices[0].tolist()) & {0, 30}


def test_beyond_a_million_entries_an_index_finds_the_same(monkeypatch, tmp_path):
    memory = random_memory(200)
    expected = memory.find(raw(memory), 3)
    monkeypatch.setattr(memory_blipren, "EXACT_UP_TO", 100)
    memory.save(tmp_path)
    assert (tmp_path / "index.usearch").stat().st_size > 0
    loaded = BliprenMemory.load(tmp_path)
    found = loaded.find(raw(memory), 3)
    same = found.indices == expected.indices
    assert same.float().mean() > 0.97  # the index is approximate, and its threads add entries in any order
    assert found.similarities[same] == pytest.approx(expected.similarities[same], abs=1e-3)


def test_saved_extended_and_damaged(tmp_path):
    memory = random_memory(settings=MemorySettings(copy_penalty=0.25, guidance=(0.5,)))
    memory.save(tmp_path)
    info = json.loads((tmp_path / "memory.json").read_text())
    info["settings"]["recombined"] = 40  # a setting of older memories
    (tmp_path / "memory.json").write_text(json.dumps(info))
    loaded = BliprenMemory.load(tmp_path)
    assert loaded.settings == memory.settings and loaded.info == memory.info
    assert torch.equal(loaded.embeddings, memory.embeddings) and loaded.texts.equals(memory.texts)
    texts = {
        "id": ["3.jpg", "new", "other"],
        "image_hash": ["a", "b", "hash 5"],
        "captions": [["c"]] * 3,
        "tokens": [[[70, 71]]] * 3,
    }
    more = loaded.extend(torch.zeros(3, 8), texts)
    assert len(more) == 31 and more.captions([30]) == [["c"]]
    assert more.are_copies([[70, 71], [3, 4], [3, 5]]).tolist() == [True, True, False]
    assert loaded.are_copies([[70, 71]]).tolist() == [False]
    more.save(tmp_path)  # over the files that are memory-mapped
    assert len(BliprenMemory.load(tmp_path)) == 31 and loaded.captions([29]) == [["caption 29"]]
    info = json.loads((tmp_path / "memory.json").read_text())
    (tmp_path / "memory.json").write_text(json.dumps(info | {"entries": 5}))
    with pytest.raises(ValueError, match="is damaged: 5 entries, 31 embeddings"):
        BliprenMemory.load(tmp_path)
    with pytest.raises(ValueError, match="blipren memory MODEL CACHE"):
        BliprenMemory.load(tmp_path / "none")


def test_copies_are_known_word_for_word_whatever_their_tokens(tmp_path, caplog):
    pieces = ["", "A", " dog", " d", "og", ".", " ", "a", " dogs", " caf", "\ufffd", "\ufffd"]
    letters = letters_of_tokens(pieces)
    known, other_tokens, plural, cut = [1, 2, 5], [7, 6, 3, 4], [1, 8, 5], [1, 5]
    hashes = hash_letters([known, other_tokens, plural, cut, [9, 10], [9, 11], []], letters).tolist()
    assert hashes[0] == hashes[1] and len(set(hashes)) == 6 and hashes[-1] == 0
    texts = {"id": ["a", "b"], "image_hash": ["a", "b"], "captions": [["A dog."], ["x"]], "tokens": [[known], [[9]]]}
    info = {"encoder": {}, "language_model": {}, "prompts": [[1]], "end": 2}
    BliprenMemory.build(torch.randn(2, 4), texts, info, letters).save(tmp_path)
    memory = BliprenMemory.load(tmp_path)
    assert memory.are_copies([known, other_tokens, plural, cut]).tolist() == [True, True, False, False]
    # a memory of before the letters compares tokens
    del memory.statistics["letters"]
    memory.statistics["caption_hashes"] = torch.from_numpy(np.unique(hash_captions([known, [9]]).view(np.int64)))
    memory.save(tmp_path)
    assert BliprenMemory.load(tmp_path).are_copies([known, other_tokens]).tolist() == [True, False]
    assert "make it again to compare words" in caplog.text


def test_regression_over_all_and_over_some_predict_alike():
    memory = random_memory()
    query = memory.standardise(raw(memory)[:1])[0]
    table, weights = memory.regress(query, torch.arange(30))
    assert weights.sum() == pytest.approx(1) and weights.argmax() == 0
    again, same = memory.regress(query, torch.arange(30).flip(0))
    assert again is table and same == pytest.approx(weights)
    _, some = memory.regress(query, torch.arange(29))
    assert some.shape == (29,) and some.argmax() == 0


def test_the_copy_penalty_allows_the_share_and_no_more():
    def ranked(margin: float) -> list[Candidate]:
        return [Candidate([1], 1 + margin, True), Candidate([2], 1.0, False)]

    candidates = [ranked(margin / 10) for margin in range(-3, 7)]
    for share in (0.0, 0.3, 0.5, 1.0):
        penalty = choose_copy_penalty(candidates, share)
        chosen = sum(own[0].score - penalty > own[1].score + 1e-9 for own in candidates)
        assert chosen == min(6, round(10 * share)) and penalty >= 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(14):
        colour_picture(i).save(folder / f"{i:02d}.png")
        split = "test" if i % 5 == 4 else "validation" if i % 5 == 3 else "train"
        rows.append({"file_name": f"{i:02d}.png", "captions": [f"picture {i}"], "split": split})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def remembering(seeing, pictures, tmp_path_factory):  # noqa: F811
    """A checkpoint with a memory of its pictures, and their cache."""
    root = tmp_path_factory.mktemp("memory")
    cache = run_embed(seeing, pictures, root / "cache", dtype="float32").folder
    model, processor = (
        BliprenForConditionalGeneration.from_pretrained(seeing),
        BliprenProcessor.from_pretrained(seeing),
    )
    for folder in (root / "model",):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    assert main(["memory", str(root / "model"), str(cache), "--device", "cpu", "--max-copies", "1"]) == 0
    return root / "model", cache


def inputs_of(processor, pictures, names, text=None):  # noqa: F811
    from PIL import Image

    texts = None if text is None else [text] * len(names)
    return processor(images=[Image.open(pictures / name) for name in names], text=texts, return_tensors="pt")


def test_captions_come_through_the_memory_and_one_argument_leaves_it_out(remembering, seeing, pictures, tmp_path):  # noqa: F811
    folder, _ = remembering
    model, processor = (
        BliprenForConditionalGeneration.from_pretrained(folder).eval(),
        BliprenProcessor.from_pretrained(folder),
    )
    plain = BliprenForConditionalGeneration.from_pretrained(seeing).eval()
    assert plain.memory is None and len(model.memory) > 5
    inputs = inputs_of(processor, pictures, ["00.png", "06.png", "11.png"])
    options = {"max_new_tokens": 12}
    own = plain.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_memory=False), own)
    ranked = model.rank_captions(**inputs, **options)
    found = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    for row, candidates in zip(found[:, length:].tolist(), ranked):
        assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)
        assert row[: len(candidates[0].tokens)] == candidates[0].tokens[:12]
    assert not torch.equal(found, own) and all(any(c.known for c in own) for own in ranked)
    # the language model's likelihood counts: that of each caption behind the prompt, with its end
    prompt = model._prompts(inputs)[0]
    some = [tuple(c.tokens) for c in ranked[0][:4]]
    for caption, likelihood in zip(some, model._log_likelihoods(some, prompt)):
        ids = torch.tensor([[*prompt.tolist(), *caption, processor.answer_end_id]])
        logs = model(input_ids=ids).logits.log_softmax(dim=-1)[0, len(prompt) - 1 : -1]
        assert likelihood == pytest.approx(logs.gather(1, ids[0, len(prompt) :, None]).sum().item(), rel=1e-4)
    model.memory = model.memory.with_settings(fluency=0.0)
    predicted = {tuple(c.tokens): c.score for c in model.rank_captions(**inputs, **options)[0]}
    scores = {tuple(c.tokens): c.score for c in ranked[0]}
    gained = [scores[caption] - predicted[caption] for caption in some]
    assert gained == pytest.approx(0.002 * model._log_likelihoods(some, prompt), rel=1e-4)
    # known captions are joined
    names, tokens = ["x", "y"], [[[84, 77, 71, 88]], [[89, 77, 71, 84]]]  # each a letter
    more = {"id": names, "image_hash": names, "captions": [["x"], ["y"]], "tokens": tokens}
    model.memory = model.memory.extend(torch.zeros(2, model.config.patch_feature_size), more)
    for joins in (0, 1):
        model.memory = model.memory.with_settings(joins=joins)
        known = {tuple(c.tokens): c.known for c in model.rank_captions(**inputs, **options)[0]}
        assert known[84, 77, 71, 88] and known.get((84, 77, 71, 84)) == (False if joins else None)
    model.load_memory(folder)
    # alone as in a batch; the same by position, and from features
    alone = inputs_of(processor, pictures, ["06.png"])
    answer = processor.decode_answer(found[1, length:])
    assert processor.decode_answer(model.generate(**alone, **options)[0, length:]) == answer
    # without known captions as candidates; each search of a batch sees its own images, also behind one with beams
    model.memory = model.memory.with_settings(retrieved=0, joins=0)
    assert len(model.rank_captions(**alone, **options)[0]) <= 6
    model.load_memory(folder)
    features = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for beams in (3, 5):
        kwargs = {
            **texts,
            "mm_encoder_outputs": {"image": features},
            "num_beams": beams,
            "num_return_sequences": beams,
        }
        assert len(model._generate_alone(kwargs)) == 3 * beams and len(features.pooler_output) == 3
    ids = alone.pop("input_ids")
    patches = model.encode_images(alone.pop("pixel_values"))
    given = model.generate(ids, patch_features=patches, **alone, **options)
    assert processor.decode_answer(given[0, length:]) == answer
    # questions and samples get the model's own answer
    asked = inputs_of(processor, pictures, ["00.png", "06.png"], "What is this?")
    assert torch.equal(model.generate(**asked, **options), plain.generate(**asked, **options))
    for more in ({"do_sample": True}, {"num_return_sequences": 2, "num_beams": 2}):
        torch.manual_seed(0)
        expected = plain.generate(**inputs, **options, **more)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **options, **more), expected)
        with pytest.raises(ValueError, match="use_memory=True, but"):
            model.generate(**inputs, **options, **more, use_memory=True)
    with pytest.raises(ValueError, match="no row has a caption prompt"):
        model.generate(**asked, use_memory=True)
    with pytest.raises(ValueError, match="a key-value cache is given"):
        model.generate(**inputs, use_memory=True, **{CACHE: DynamicCache(config=model.config.get_text_config())})
    # a conversation that is not streamed ranks the caption of its first turn
    from PIL import Image

    photo = [Image.open(pictures / "06.png")]
    assert Conversation(model, processor).ask(None, photo, max_new_tokens=12) == answer
    with pytest.raises(ValueError, match="has no memory"):
        plain.generate(**inputs, use_memory=True)


def test_doubts_about_words_count_less_in_a_small_memory(remembering, pictures):  # noqa: F811
    assert doubt_weight(random_memory(30, settings=MemorySettings(invention_penalty=1.0))) == 30 / (30 + HALF_DOUBTED)
    folder, _ = remembering
    model = BliprenForConditionalGeneration.from_pretrained(folder).eval()
    inputs = inputs_of(BliprenProcessor.from_pretrained(folder), pictures, ["06.png"])
    captions = [[own[0], own[0][:-1] + [77]] for own in model.memory.tokens(list(range(len(model.memory))))]
    names = [f"more {i}" for i in range(len(captions))]
    texts = {"id": names, "image_hash": names, "captions": [["x", "y"]] * len(names), "tokens": captions}
    model.memory = model.memory.extend(torch.randn(len(names), model.config.patch_feature_size), texts)
    memory, scores = model.memory, []
    for penalty in (0.0, 5.0):
        model.memory = memory.with_settings(invention_penalty=penalty, joins=0, fluency=0.0)
        scores.append({tuple(c.tokens): c.score for c in model.rank_captions(**inputs, max_new_tokens=12)[0]})
    features = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    embedding = pool_patches(*masked_patches(features, {"pixel_values": inputs["pixel_values"]}))
    table, weights = memory.regress(memory.standardise(embedding)[0], memory.find(embedding, len(memory)).indices[0])
    doubts, share = table.doubts(weights), len(memory) / (len(memory) + HALF_DOUBTED)
    for caption in memory.tokens([0])[0] + captions[0]:
        lost = 5.0 * share * sum(doubts.get(token, 0.0) for token in set(caption))
        assert scores[0][tuple(caption)] - scores[1][tuple(caption)] == pytest.approx(lost, abs=1e-9)
    assert max(doubts.values()) > 0.1


def test_a_penalty_keeps_copies_out_and_neighbours_are_shown(remembering, pictures):  # noqa: F811
    folder, cache = remembering
    model, processor = (
        BliprenForConditionalGeneration.from_pretrained(folder).eval(),
        BliprenProcessor.from_pretrained(folder),
    )
    inputs = inputs_of(processor, pictures, ["00.png"])
    model.memory = model.memory.with_settings(copy_penalty=100.0)
    best = model.rank_captions(**inputs, max_new_tokens=12)[0]
    assert any(c.known for c in best) and (not best[0].known or all(c.known for c in best))
    images = {"pixel_values": inputs["pixel_values"]}
    shown = model.find_neighbours(3, **images)[0]
    assert shown[0]["id"] == "00.png" and shown[0]["similarity"] > 0.99 and shown[0]["captions"] == ["picture 0"]
    others = model.find_neighbours(3, exclude=["00.png"], **images)[0]
    assert "00.png" not in {one["id"] for one in others}


def test_saved_with_the_model_exchanged_and_refused(remembering, pictures, tmp_path):  # noqa: F811
    folder, cache = remembering
    model = BliprenForConditionalGeneration.from_pretrained(folder)
    for save in (model.save_pretrained, model.save_bridge):
        target = tmp_path / save.__name__
        save(target)
        assert len(BliprenForConditionalGeneration.from_pretrained(target).memory) == len(model.memory)
    assert main(["memory", str(folder), str(cache), "--split", "test", "--out", str(tmp_path / "other"),
                 "--max-copies", "1", "--device", "cpu"]) == 0  # fmt: skip
    before = len(model.memory)
    model.load_memory(tmp_path / "other")
    assert len(model.memory) < before
    model.load_memory(folder)  # a checkpoint's
    assert len(model.memory) == before
    assert main(["memory", str(folder), str(cache), "--split", "test", "--out", str(tmp_path / "other"),
                 "--extend"]) == 0  # fmt: skip
    model.load_memory(None)
    assert model.memory is None
    with pytest.raises(ValueError, match="has no memory"):
        model.load_memory(tmp_path)
    info = json.loads((tmp_path / "other" / "memory.json").read_text())
    info["encoder"]["vision"] = "another"
    (tmp_path / "other" / "memory.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="made for another model: encoder vision is 'another'"):
        model.load_memory(tmp_path / "other")


def test_what_is_asked_of_a_model_without_a_memory_and_of_a_hub_that_is_not_reached(remembering, tmp_path, caplog):
    folder, _ = remembering
    model = BliprenForConditionalGeneration.from_pretrained(folder)
    assert not caplog.records  # a folder without an adapter is no reason for a warning
    model.load_memory(None)
    with pytest.raises(ValueError, match="the model has no memory"):
        model.find_neighbours()
    with pytest.raises(ValueError, match="no memory and no reranker ranks captions"):
        model.rank_captions()
    options = {"local_files_only": True, "cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="has no memory"):
        model.load_memory("user/model", **options)
    assert "user/model is loaded without memory/memory.json: the Hub was not reached" in caplog.text
    with pytest.raises(OSError, match="Repo id must"):
        model.load_memory("neither/a/folder/nor/an/id", **options)


def test_the_command_counts_chooses_and_refuses(remembering, pictures, tmp_path, capsys):  # noqa: F811
    folder, cache = remembering
    out = tmp_path / "out"
    assert main(["memory", str(folder), str(cache), "--out", str(out), "--device", "cpu", "--max-copies", "0.25"]) == 0
    printed = capsys.readouterr().out
    count = FeatureCache.open(cache).num_rows("validation")
    assert f"choosing the copy penalty on {count} validation images" in printed and "copy penalty" in printed
    memory = BliprenMemory.load(out)
    assert len(memory) == FeatureCache.open(cache).num_rows("train")
    assert main(["memory", str(folder), str(cache), "--out", str(out), "--extend"]) == 0
    assert "0 new" in capsys.readouterr().out and len(BliprenMemory.load(out)) == len(memory)
    assert main(["memory", str(folder), str(cache), "--out", str(tmp_path / "none"), "--extend"]) == 1
    assert "cannot be extended" in capsys.readouterr().err
    assert main(["memory", str(folder), str(cache), "--max-copies", "2"]) == 2
    assert main(["memory", "user/model", str(cache)]) == 2


def test_the_texts_are_answers_to_the_caption_prompt(remembering):
    folder, cache = remembering
    model, processor = (
        BliprenForConditionalGeneration.from_pretrained(folder),
        BliprenProcessor.from_pretrained(folder),
    )
    embeddings, texts, without = read_cache(FeatureCache.open(cache), "train", processor)
    assert len(embeddings) == len(texts["id"]) and without == 0
    assert processor.decode_answer(texts["tokens"][0][0]) == texts["captions"][0][0]
    assert memory_info(model, processor) == model.memory.info


def test_entries_are_half_the_image_and_half_its_views(seeing, tmp_path):  # noqa: F811
    rows = [{"file_name": f"{i}.png", "captions": ["noise"], "split": "train"} for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        random_image(int(row["file_name"][0])).save(tmp_path / row["file_name"])
    cache = FeatureCache.open(run_embed(seeing, tmp_path, tmp_path / "cache", dtype="float32", views=3).folder)
    views = [cache.patch_features("train", [0, 1], [view] * 2)[0].mean(dim=1) for view in range(3)]
    assert not torch.allclose(views[0], views[1])
    expected = views[0] * (1 / 2 + 1 / 6) + (views[1] + views[2]) / 6
    assert embed_rows(cache, "train", [0, 1]) == pytest.approx(expected, abs=1e-6)


def test_evaluate_says_neighbours_and_copies(remembering, pictures, tmp_path, capsys):
    folder, _ = remembering
    options = ["--split", "train", "--resamples", "10", "--no-report", "--device", "cpu", "--max-new-tokens", "12"]
    assert main(["evaluate", str(folder), str(pictures), str(tmp_path / "with"), *options]) == 0
    metrics = json.loads((tmp_path / "with" / "metrics.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "with" / "predictions.jsonl").open()]
    assert (
        metrics["memory"]["copies"] == sum(row["copied"] for row in rows)
        and "captions of it" in capsys.readouterr().out
    )
    for row in rows:  # on the images of the memory itself no image is its own neighbour
        assert row["id"] not in {one["id"] for one in row["neighbours"]} and len(row["neighbours"]) <= 3
    assert any(row["neighbours"] for row in rows)
    assert main(["evaluate", str(folder), str(pictures), str(tmp_path / "without"), "--no-memory", *options]) == 0
    assert "memory" not in json.loads((tmp_path / "without" / "metrics.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "without" / "predictions.jsonl").open()]
    assert not any("neighbours" in row for row in rows)
