"""Search finds what the retrieval task of `evaluate` ranks first, and an index beyond a matrix product finds the same."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from blipren import BliprenForImageTextRetrieval, BliprenProcessor
from blipren.training.captioning.feature_reader import FeatureReader
from blipren.training.captioning.image_sources import open_images
from blipren.training.captioning.pictures import PictureConfig
from blipren.training.cli import main
from blipren.training.evaluation.metrics.retrieval import embed_texts
from blipren.training.search import index as index_module
from blipren.training.search.index import ImageIndex, open_index
from blipren.training.search.words import bm25
from tests.captioning.conftest import aligned, pictures, seeing  # noqa: F401
from tests.data.tools import run_embed


def search(*arguments) -> int:
    return main(["search", *map(str, arguments), "--workers", "0", "--device", "cpu"])


def results(out) -> list[dict]:
    return json.loads((out / "results.json").read_text())["results"]


def test_recall_is_that_of_evaluate(aligned, pictures, tmp_path):  # noqa: F811
    report = tmp_path / "report"
    options = ["--tasks", "retrieval", "--split", "train", "--resamples", "10", "--no-report", "--device", "cpu"]
    assert main(["evaluate", str(aligned), str(pictures), str(report), *options]) == 0
    metrics = json.loads((report / "metrics.json").read_text())["retrieval"]["text_to_image"]
    model, processor = BliprenForImageTextRetrieval.from_pretrained(aligned), BliprenProcessor.from_pretrained(aligned)
    source = open_images([str(pictures)], "train", None, {"follow_links": False})
    reader = FeatureReader(source, model.eval(), PictureConfig(processor.image_processor), 4, 0)
    index = open_index(tmp_path / "index", reader, model, {})
    queries = embed_texts(model, processor.qformer_tokenizer, [row["captions"][0] for row in index.rows])
    scores, numbers = index.search(queries, len(index.rows))
    for k in (1, 5, 10):
        # ties count against the model, as they do in `evaluate`
        own = torch.tensor([[int(n) == i for n in numbers[i]] for i in range(len(queries))])
        ranks = [(scores[i] >= scores[i][own[i]]).sum() for i in range(len(queries))]
        assert np.mean([rank <= k for rank in ranks]) == pytest.approx(metrics[f"R@{k}"])


def test_the_command(aligned, pictures, seeing, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert search(pictures, "a red picture", "--model", aligned, "--out", out, "--top", "5") == 0
    printed = capsys.readouterr().out
    assert "22 rows = 20 indexed + 2 rejected" in printed and "5 pictures are in" in printed
    found = results(out)
    assert [one["rank"] for one in found] == [1, 2, 3, 4, 5]
    assert found[0]["captions"] == [f"picture {int(found[0]['id'][:2])}"]
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 500
    assert search(pictures, pictures / "03.png", "--model", aligned, "--out", out, "--top", "3") == 0
    assert "indexed" not in capsys.readouterr().out
    assert results(out)[0]["id"] == "03.png" and results(out)[0]["score"] == pytest.approx(1, abs=1e-4)
    assert search(pictures, "x", "--model", aligned, "--out", out, "--split", "test") == 1
    assert "was made with source" in capsys.readouterr().err
    part = tmp_path / "part"
    assert search(pictures, "a red picture", "--model", aligned, "--out", part, "--split", "test") == 0
    assert {int(one["id"][:2]) % 5 for one in results(part)} == {4} and len(results(part)) == 4
    assert "4 pictures are in" in capsys.readouterr().out
    cache = run_embed(seeing, pictures, tmp_path / "cache", dtype="float32").folder
    more = ["--model", aligned, "--out", tmp_path / "cached", "--pictures", pictures, "--top", "4"]
    assert search(cache, "a red picture", *more) == 0
    assert "4 pictures are in" in capsys.readouterr().out


def test_words_of_captions(pictures, tmp_path, capsys):  # noqa: F811
    assert search(pictures, "picture 11", "--out", tmp_path / "out", "--top", "3") == 0
    assert results(tmp_path / "out")[0]["id"] == "11.png"
    scores = bm25("red dog", [["a red dog"], ["a red ball", "a dog"], ["a green dog and more words behind it"], ["x"]])
    assert scores[0] > scores[1] > scores[2] > scores[3] == 0
    assert search(pictures, "zebra", "--out", tmp_path / "none") == 0
    assert "nothing in" in capsys.readouterr().out


@pytest.mark.parametrize("per_image", [1, 3])
def test_an_index_beyond_a_matrix_product(per_image, tmp_path, monkeypatch):
    pytest.importorskip("usearch", reason="the extra search is not installed")
    vectors = torch.nn.functional.normalize(torch.randn(600, per_image, 16), dim=-1)
    np.save(tmp_path / "embeddings.npy", vectors.numpy())
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "place": i, "captions": []}) + "\n" for i in range(600))
    )
    (tmp_path / "index.json").write_text("{}")
    queries = torch.nn.functional.normalize(torch.randn(20, 16), dim=-1)
    exact, numbers = ImageIndex(tmp_path).search(queries, 10)
    assert numbers[:, 0].equal((vectors @ queries.T).amax(1).argmax(0))
    monkeypatch.setattr(index_module, "EXACT_UP_TO", 100)
    scores, found = ImageIndex(tmp_path).search(queries, 10)
    assert (tmp_path / "vectors.usearch").exists()
    assert np.mean([len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(found, numbers)]) > 0.9
    assert scores[:, 0].allclose(exact[:, 0], atol=1e-3)
