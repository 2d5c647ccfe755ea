"""report.html: one file, no request, and its interactions work in a real browser."""

import base64
import json
import re

import pytest
import torch
from PIL import Image

from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.evaluation.evaluate import evaluate
from blipren.training.evaluation.metrics.captions import NO_JAVA
from blipren.training.evaluation.report.page import headline_tiles, render_page
from blipren.training.evaluation.report.pictures import image_url, map_bytes, similarity_grid
from blipren.training.evaluation.report.training import preference_lines, training_curves
from tests.evaluation.conftest import colour_picture, colour_rows, learn, new_model, save
from tests.evaluation.report.browser import browse, needs_chromium


@pytest.fixture(scope="module")
def report(colours, untrained, tmp_path_factory):
    """Report of a model with a mixture of experts, with curves, questions, and the untrained one beside it."""
    folder = tmp_path_factory.mktemp("report")
    model, processor = new_model(folder, projector="moe")
    learn(model, processor, colour_rows(6), [colour_picture(i) for i in range(6)], steps=60)
    save(folder / "model", model, processor)
    curves = {"train loss": [[i, 3 / (1 + i)] for i in range(50)], "validation loss": [[0, 3.1], [40, 0.2], [49, 0.3]]}
    (folder / "model" / "curves.json").write_text(json.dumps(curves | {"train learning_rate": [[0, 0], [49, 1e-4]]}))
    (folder / "model" / "finished.json").write_text(json.dumps({"steps": 49, "kept": "step 40"}))
    evaluate(
        EvaluateSettings(
            model=str(folder / "model"), dataset=str(colours), out=str(folder / "out"), tasks=["captioning", "vqa"],
            before=str(untrained), meteor=False, max_new_tokens=24, device="cpu", resamples=100, attention_images=2,
        )
    )  # fmt: skip
    return folder / "out" / "report.html"


def embedded(page) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL).group(1))


def test_the_page_holds_everything_and_asks_for_nothing(report):
    text = report.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r'(?:src|href)\s*=\s*["\'](?!data:|#)', text) and "@@" not in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text.split('id="data"')[0])
    data = embedded(report)
    assert len(data["gallery"]) == 24 and all(
        p["image"].startswith("data:image/jpeg;base64,") for p in data["gallery"]
    )
    assert data["image_use"]["verdict"] and data["vqa"]["questions"] == 24 and data["chosen_step"] == 40
    assert {tile["name"] for tile in data["tiles"]} >= {"CIDEr", "BLEU-4", "ROUGE-L", "METEOR", "question accuracy"}
    assert all("before" in p for p in data["gallery"])
    assert len(data["routing"]["mean_probability"]) == 4
    for item in data["explained"]:
        size = item["height"] * item["width"]
        assert len(base64.b64decode(item["word_maps"])) == size * len(item["words"])
        assert len(base64.b64decode(item["query_maps"])) == size * item["queries"] * (item["layers"] + 1)
        assert len(base64.b64decode(item["mean_maps"])) == size * (item["layers"] + 1) and len(item["router"]) == 4
    assert "split 'test'" in data["measured"]["images"] and data["settings"]["max_new_tokens"] == "24"


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_interactions_in_chromium(report, width):
    script = r"""
      const text = (id) => document.getElementById(id).textContent;
      const map = () => document.getElementById("map").toDataURL();
      found.ready = document.documentElement.dataset.ready;
      found.sections = [...document.querySelectorAll("section h2")].map((n) => n.textContent);
      found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      const order = document.getElementById("order"), grid = document.getElementById("grid");
      found.few = grid.children.length;
      document.getElementById("more").click();
      found.all = grid.children.length;
      order.value = "longest caption"; order.dispatchEvent(new Event("change"));
      found.longest = grid.children[0].querySelector(".caption").textContent;
      const find = document.querySelector("input[type=search]");
      find.value = "yellow"; find.dispatchEvent(new Event("input"));
      found.yellow = grid.children.length;
      const before = map();
      document.getElementById("words").children[1].click();
      found.word = text("map-title"); found.word_changed = map() !== before;
      document.querySelector("#queries [data-kind=query]").click();
      found.query = text("map-title");
      const layer = document.getElementById("layer");
      layer.value = "0"; layer.dispatchEvent(new Event("change"));
      found.layer = text("map-title");
      document.querySelector("#queries [data-kind=norm]").click();
      found.norm = text("map-title");
      document.querySelector(".thumbs").children[1].click();
      found.pressed = document.querySelector(".thumbs").children[1].getAttribute("aria-pressed");
      const paper = () => getComputedStyle(document.body).backgroundColor;
      const light = paper();
      document.getElementById("theme").click();
      found.theme_changed = paper() !== light;
      found.curves = document.querySelectorAll("svg.curve polyline").length;
      found.chosen = document.querySelector("svg.curve").textContent.includes("chosen: step 40");
      found.verdict = text("verdict");
      found.odd = /\[object |undefined|NaN/.test(document.querySelector("main").textContent);
      found.provenance = text("provenance");
    """
    found = browse(report, script, width)
    assert found["errors"] == [] and found["console"] == []
    assert found["width"] == width
    assert found["ready"] == "yes" and found["wide"] <= 0
    assert found["sections"] == ["Numbers", "Image use", "Images", "Attention", "Questions", "Experts", "Training", "Provenance"]  # fmt: skip
    assert (found["few"], found["all"], found["yellow"]) == (12, 24, 4) and "yellow" in found["longest"]
    assert "gradient" in found["word"] and found["word_changed"] and "grid 4 × 4" in found["word"]
    assert found["query"].startswith("query 1, mean over layers") and "cross-attention layer 1" in found["layer"]
    assert found["norm"].startswith("norm of each patch") and found["pressed"] == "true"
    assert found["theme_changed"] and found["curves"] == 3 and found["chosen"]
    assert found["verdict"].startswith("This model ")
    assert not found["odd"] and "max_new_tokens24" in found["provenance"]


@needs_chromium
def test_dark_is_followed(report):
    paper = "found.paper = getComputedStyle(document.body).backgroundColor;"
    assert browse(report, paper)["paper"] != browse(report, paper, dark=True)["paper"]


@needs_chromium
def test_retrieval_and_pope_are_shown(report, tmp_path):
    data = embedded(report)
    ways = {"R@1": 0.5, "R@5": 0.75, "R@10": 1.0, "median_rank": 2.0}
    both = {"image_to_text": ways, "text_to_image": ways}
    photos = [item["image"] for item in data["gallery"][:3]]
    grid = {
        "images": photos,
        "captions": ["a", "b", "c"],
        "scores": [[0.9, 0.1, 0.2], [0.3, 0.8, 0.1], [0.2, 0.2, 0.7]],
    }
    data["retrieval"] = both | {"chance": both, "grid": grid}
    row = {"accuracy": 0.6, "precision": 0.5, "recall": 0.7, "F1": 0.58, "yes_share": 0.6, "questions": 30}
    data["pope"] = {"random": row, "images": 5}
    page = tmp_path / "page.html"
    page.write_text(render_page(data, "report.js", "title", "subtitle"))
    script = """
      found.rows = document.querySelectorAll("#retrieval tbody tr").length;
      found.own = [...document.querySelectorAll("#retrieval .cell.own")].map((n) => n.textContent);
      found.pope = document.querySelector("#pope tbody").textContent;
      found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    """
    found = browse(page, script, 390)
    assert found["errors"] == [] and found["rows"] == 4 and found["own"] == ["0.90", "0.80", "0.70"]
    assert found["pope"].startswith("random0.600") and found["wide"] <= 0


HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!-- <b>bold</b> \u2028 @@data@@"


@needs_chromium
def test_captions_stay_text(report, tmp_path):
    data = embedded(report)
    data["gallery"][0] |= {"caption": HOSTILE, "references": [HOSTILE], "id": HOSTILE}
    data["explained"][0]["caption"] = HOSTILE
    data["explained"][0]["words"][0] = HOSTILE
    page = tmp_path / "page.html"
    page.write_text(render_page(data, "report.js", HOSTILE, HOSTILE))
    script = 'found.images = document.querySelectorAll("img[onerror]").length; found.title = document.title;'
    script += 'found.shown = [...document.querySelectorAll(".caption")].some((n) => n.textContent.startsWith("<" + "/script>"));'
    found = browse(page, script)
    assert found["errors"] == [] and found["images"] == 0 and found["shown"] and found["title"] == HOSTILE.strip()


def test_page_without_a_model(colours, tmp_path):
    rows = [json.loads(line) for line in (colours / "metadata.jsonl").read_text().splitlines()]
    given = tmp_path / "given.json"
    given.write_text(json.dumps({row["file_name"]: row["captions"][1] for row in rows}))
    settings = EvaluateSettings(
        model="-",
        dataset=str(colours),
        out=str(tmp_path / "out"),
        predictions=str(given),
        meteor=False,
        report_images=8,
    )
    evaluate(settings)
    data = embedded(tmp_path / "out" / "report.html")
    assert len(data["gallery"]) == 8 and data["explained"] == [] and data["image_use"] is None


def test_tiles_carry_what_was_before():
    captioning = {"CIDEr": 1.0, "BLEU-4": 0.2, "ROUGE-L": 0.5, "METEOR": None, "unique_captions": 1.0, "length": 9.0}
    captioning["notes"] = [NO_JAVA]
    captioning["intervals"] = {"CIDEr": (0.9, 1.1), "length": (8.0, 10.0)}
    tiles = headline_tiles({"captioning": captioning, "before": {"captioning": {"CIDEr": 0.1}}})
    assert tiles[0] == {
        "name": "CIDEr",
        "value": 1.0,
        "note": "",
        "full": None,
        "low": 0.9,
        "high": 1.1,
        "before": 0.1,
    }
    assert tiles[3]["note"] == NO_JAVA


def test_curves_of_no_run(tmp_path):
    assert training_curves(str(tmp_path)) == ([], None)
    (tmp_path / "curves.json").write_text(
        json.dumps({"train loss": [[0, float("nan")], [1, 2.0]], "train x": [[0, 1]]})
    )
    panels, chosen = training_curves(str(tmp_path))
    assert panels == [{"title": "loss", "lines": [{"name": "train loss", "points": [[1, 2.0]]}]}] and chosen is None
    assert preference_lines(str(tmp_path)) == {}
    summary = {"steps": 9, "kept": "last", "validation": {"reward": {"before": 0.5, "after": 0.75}}}
    (tmp_path / "finished.json").write_text(json.dumps(summary))
    assert training_curves(str(tmp_path))[1] == 9
    lines = preference_lines(str(tmp_path))
    assert lines == {"mean reward of greedy answers": "0.5000 before training, 0.7500 after"}


def test_pictures():
    maps = torch.tensor([[[0.1, 0.2], [0.3, 0.5]], [[7.0, 7.0], [7.0, 7.0]]])
    assert list(base64.b64decode(map_bytes(maps))) == [0, 64, 128, 255, 0, 0, 0, 0]
    assert len(image_url(colour_picture(0, (2000, 1500)))) < 20_000


def test_similarity_grid(tmp_path):
    images = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    path = similarity_grid(tmp_path / "new" / "grid.png", images, ["red $1", "green", "blue"], torch.eye(3))
    with Image.open(path) as picture:
        assert picture.width > 200
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 10
    with pytest.raises(ValueError, match="3 images need 3 captions"):
        similarity_grid(tmp_path / "no.png", images, ["one"], torch.eye(3))
