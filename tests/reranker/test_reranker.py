"""A reranker: its tables, its training, and the captions that it chooses through `generate`."""

import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.consensus_blipren import DocumentFrequencies, ReferenceTable
from blipren.reranker_blipren import BliprenReranker, RerankerNetwork, RerankerSettings
from blipren.training.cli import main
from blipren.training.conversation.conversation import Conversation
from blipren.training.reranker.fit import keep_some
from blipren.training.reranker.tables import build_tables, coordinates
from tests.captioning.conftest import seeing  # noqa: F401
from tests.data.tools import run_embed
from tests.evaluation.conftest import colour_picture
from tests.memory.tools import random_memory

FIELD, STREET = [[5, 6, 7, 8, 9], [5, 6, 7, 9, 8]], [[20, 21, 22, 23, 9], [20, 21, 22, 8, 23]]
CAPTIONS = [FIELD, FIELD, STREET, STREET, FIELD + STREET]  # each n-gram is of several images; all have the same length


def test_with_all_directions_the_score_is_cider():
    tables = build_tables(CAPTIONS, width=9)
    wanted = coordinates(CAPTIONS, tables, len(CAPTIONS)).numpy()
    network = RerankerNetwork(3, tables["directions"].shape[1], 1, 4, 1)
    info = {"images": len(CAPTIONS), "shape": network.shape}
    reranker = BliprenReranker(network, tables, info, RerankerSettings())
    candidates = [[5, 6, 7, 8, 9], [20, 21, 22, 23, 9], [5, 6, 22, 23, 9], [60, 61, 62, 63, 64]]
    exact = ReferenceTable(CAPTIONS, DocumentFrequencies.count(CAPTIONS))
    for image, own in enumerate(wanted):
        cider = exact.predicted_cider(candidates, np.eye(len(CAPTIONS))[image])
        assert reranker.score(candidates, own) == pytest.approx(cider, abs=5e-3)
    # a caption that is shorter than all loses as CIDEr-D says
    short = exact.predicted_cider([[5, 6]], np.eye(len(CAPTIONS))[0])
    assert reranker.score([[5, 6]], wanted[0]) == pytest.approx(short, abs=5e-3) and 0 < short < 5
    # n-grams of one image alone are left out
    assert len(build_tables([*CAPTIONS, [[70, 71, 72]]], 9)["ngrams"]) == len(tables["ngrams"])


def test_patches_are_kept_at_random_and_padding_last():
    torch.manual_seed(0)
    patches = torch.arange(12.0).view(2, 6, 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    seen = set()
    for _ in range(20):
        kept, own = keep_some(patches, mask, 0.5)
        assert kept.shape == (2, 3, 1) and own.sum(dim=1).tolist() == [3, 2]
        assert set(kept[1, own[1] == 1, 0].tolist()) == {6.0, 7.0}
        seen.add(tuple(sorted(kept[0, :, 0].tolist())))
    assert len(seen) > 5
    assert keep_some(patches, None, 0.0)[1] is None


@pytest.fixture(scope="module")
def ranking(seeing, tmp_path_factory):  # noqa: F811
    """A checkpoint with a reranker of its pictures, their folder and their cache."""
    root = tmp_path_factory.mktemp("reranker")
    pictures, rows = root / "pictures", []
    pictures.mkdir()
    for i in range(14):
        colour_picture(i).save(pictures / f"{i:02d}.png")
        split = "validation" if i % 5 == 3 else "train"
        rows.append({"file_name": f"{i:02d}.png", "captions": [f"picture {i % 3}", f"colour {i % 3}"], "split": split})
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = run_embed(seeing, pictures, root / "cache", dtype="float32").folder
    for part in (BliprenForConditionalGeneration, BliprenProcessor):
        part.from_pretrained(seeing).save_pretrained(root / "model")
    options = ["--device", "cpu", "--max-steps", "5", "--batch-size", "4"]
    assert main(["reranker", str(root / "model"), str(cache), *options]) == 0
    return root / "model", pictures, cache


def open_pair(folder):
    return BliprenForConditionalGeneration.from_pretrained(folder).eval(), BliprenProcessor.from_pretrained(folder)


def test_it_learns_what_the_captions_say(ranking, tmp_path, capsys):
    folder, _, cache = ranking
    errors, explained = [], []
    for steps in ("1", "150"):
        out = tmp_path / steps
        options = ["--max-steps", steps, "--batch-size", "16", "--feature-dropout", "0", "--device", "cpu"]
        assert main(["reranker", str(folder), str(cache), "--out", str(out), *options]) == 0
        printed = capsys.readouterr().out
        assert f"the reranker is in {out}" in printed and f"step {steps}/{steps}" in printed
        losses = [float(line.split("loss ")[1].split()[0]) for line in printed.splitlines() if "  loss " in line]
        errors.append(losses[-1])
        explained.append(float(printed.split("validation images: ")[1].split()[0]))
    assert errors[1] < 0.5 * errors[0] and explained[1] > explained[0]
    assert main(["reranker", str(folder), str(cache), "--feature-dropout", "1"]) == 2
    assert main(["reranker", str(folder), str(cache), "--width", "0"]) == 2
    assert main(["reranker", "user/model", str(cache)]) == 2


def test_it_chooses_among_the_models_own_captions_and_one_argument_leaves_it_out(ranking, seeing, tmp_path):  # noqa: F811
    from PIL import Image

    folder, pictures, _ = ranking
    model, processor = open_pair(folder)
    plain = BliprenForConditionalGeneration.from_pretrained(seeing).eval()
    photos = [Image.open(pictures / name) for name in ("00.png", "06.png", "11.png")]
    inputs, options = processor(images=photos, return_tensors="pt"), {"max_new_tokens": 12}
    own, length = plain.generate(**inputs, **options), inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(**inputs, **options, use_reranker=False), own)
    model.reranker = model.reranker.with_settings(joins=0, fluency=0.0)
    beams = plain.generate(**inputs, **options, num_beams=8, num_return_sequences=8)[:, length:].tolist()
    end, ranked = processor.answer_end_id, model.rank_captions(**inputs, **options)
    predicted = model.reranker.predict(model.encode_images(inputs["pixel_values"]))
    for row, candidates in enumerate(ranked):
        answers = [tuple(a[: a.index(end)]) for a in beams[row * 8 : row * 8 + 8] if end in a[1:]]
        assert {tuple(c.tokens) for c in candidates} == set(answers)
        scores = model.reranker.score([c.tokens for c in candidates], predicted[row])
        assert [c.score for c in candidates] == pytest.approx(scores.tolist()) and not any(c.known for c in candidates)
        assert candidates[0].score == max(scores)
    found = model.generate(**inputs, **options)
    for row, candidates in zip(found[:, length:].tolist(), ranked):
        assert row[: len(candidates[0].tokens) + 1] == [*candidates[0].tokens, end]
    assert Conversation(model, processor).ask(None, photos[1:2], **options) == processor.decode_answer(
        ranked[1][0].tokens
    )
    # questions and samples get the model's own answer
    asked = processor(images=photos, text=["What is this?"] * 3, return_tensors="pt")
    assert torch.equal(model.generate(**asked, **options), plain.generate(**asked, **options))
    with pytest.raises(ValueError, match="use_reranker=True, but no row has a caption prompt"):
        model.generate(**asked, use_reranker=True)
    with pytest.raises(ValueError, match="use_reranker=True, but the model has no reranker"):
        plain.generate(**inputs, use_reranker=True)


def test_questions_beside_captions_short_answers_and_other_precisions(ranking):
    from PIL import Image

    folder, pictures, _ = ranking
    model, processor = open_pair(folder)
    photos = [Image.open(pictures / name) for name in ("00.png", "06.png")]
    mixed = processor(images=photos, text=[processor.prompts[0], "What is this?"], return_tensors="pt")
    length, options = mixed["input_ids"].shape[1], {"max_new_tokens": 12}
    plain = model.generate(**mixed, **options, use_reranker=False)
    for memory in (None, random_memory(model, processor, seed=0)):
        model.memory = memory
        answers = [processor.decode_answer(row) for row in model.generate(**mixed, **options)[:, length:].tolist()]
        assert answers[1] == processor.decode_answer(plain[1, length:].tolist())
        alone = processor(images=photos[0], return_tensors="pt")
        caption = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert answers[0] == processor.decode_answer(caption.tolist())
    model.memory = None
    inputs = processor(images=photos, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1
    config = GenerationConfig(**{**model.generation_config.to_dict(), **options, "return_dict_in_generate": True})
    own = model.generate(**inputs, generation_config=config, use_reranker=False).sequences
    assert torch.equal(model.generate(**inputs, generation_config=config).sequences, own)
    # padding has no part
    patches = model.encode_images(inputs["pixel_values"])
    padded = torch.cat([patches, torch.full_like(patches, 7.0)], dim=1)
    mask = torch.cat([torch.ones(patches.shape[:2]), torch.zeros(patches.shape[:2])], dim=1).long()
    expected = model.reranker.predict(patches)
    assert model.reranker.predict(padded, mask) == pytest.approx(expected, abs=1e-5)
    assert model.reranker.predict(padded) != pytest.approx(expected, abs=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.reranker.predict(patches) == pytest.approx(expected, rel=0.1, abs=0.05)


def test_a_memory_ranks_in_its_place(ranking):
    from PIL import Image

    folder, pictures, _ = ranking
    model, processor = open_pair(folder)
    inputs = processor(images=Image.open(pictures / "00.png"), return_tensors="pt")

    def ranked(**use):
        return [(tuple(c.tokens), c.score) for c in model.rank_captions(**inputs, max_new_tokens=12, **use)[0]]

    alone = ranked()
    model.memory = random_memory(model, processor, seed=0)
    assert (
        ranked()
        == ranked(use_reranker=False)
        != alone
        == ranked(use_memory=False)
        == ranked(use_memory=False, use_reranker=True)
    )
    for ask in (ranked, lambda **use: model.generate(**inputs, **use)):
        with pytest.raises(ValueError, match="the memory ranks captions: give use_memory=False, too"):
            ask(use_reranker=True)


def test_saved_with_the_model_exchanged_and_refused(ranking, tmp_path):
    folder, _, cache = ranking
    model, _ = open_pair(folder)
    for save in (model.save_pretrained, model.save_bridge):
        target = tmp_path / save.__name__
        save(target)
        again = BliprenForConditionalGeneration.from_pretrained(target)
        assert again.reranker.fingerprint() == model.reranker.fingerprint()
    model.save_pretrained(folder)  # over the file that is memory-mapped
    options = ["--max-steps", "3", "--batch-size", "4", "--seed", "1", "--device", "cpu"]
    assert main(["reranker", str(folder), str(cache), "--out", str(tmp_path / "other"), *options]) == 0
    before = model.reranker.fingerprint()
    model.load_reranker(tmp_path / "other")
    assert model.reranker.fingerprint() != before
    model.load_reranker(folder)  # a checkpoint's
    assert model.reranker.fingerprint() == before
    model.load_reranker(None)
    assert model.reranker is None
    with pytest.raises(ValueError, match="has no reranker"):
        model.load_reranker(tmp_path)
    content = json.loads((tmp_path / "other" / "reranker.json").read_text())
    content["encoder"]["vision"] = "another"
    (tmp_path / "other" / "reranker.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="blipren reranker MODEL CACHE"):
        model.load_reranker(tmp_path / "other")
    (tmp_path / "other" / "reranker.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match="newer format"):
        model.load_reranker(tmp_path / "other")


def test_evaluate_says_so_and_leaves_it_out(ranking, tmp_path, capsys):
    folder, pictures, _ = ranking
    options = [
        "--split",
        "validation",
        "--resamples",
        "10",
        "--no-report",
        "--device",
        "cpu",
        "--max-new-tokens",
        "12",
    ]
    assert main(["evaluate", str(folder), str(pictures), str(tmp_path / "with"), *options]) == 0
    assert "reranker: chose among 8 captions" in capsys.readouterr().out
    assert json.loads((tmp_path / "with" / "metrics.json").read_text())["reranker"]["num_beams"] == 8
    assert main(["evaluate", str(folder), str(pictures), str(tmp_path / "without"), "--no-reranker", *options]) == 0
    assert "reranker" not in json.loads((tmp_path / "without" / "metrics.json").read_text())
    assert main(["evaluate", str(folder), str(pictures), str(tmp_path / "asked"), "--prompt", "Who?", *options]) == 0
    assert "reranker" not in json.loads((tmp_path / "asked" / "metrics.json").read_text())
