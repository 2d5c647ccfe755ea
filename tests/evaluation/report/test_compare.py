"""compare: paired differences, the images that changed most, and a page that shows both."""

import json

import pytest

from blipren.training.cli import main
from blipren.training.commands.compare import CompareSettings
from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.errors import UserError
from blipren.training.evaluation.evaluate import evaluate
from blipren.training.evaluation.report.compare import compare, paired_statistics, read_run, verdict
from tests.evaluation.report.browser import browse, needs_chromium


@pytest.fixture(scope="module")
def runs(seeing, blind, colours, tmp_path_factory):
    """Evaluation folders of the model that is blind (A) and of the one that sees (B)."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in (("blind", blind), ("seeing", seeing)):
        evaluate(
            EvaluateSettings(
                model=str(model), dataset=str(colours), out=str(folder / name), tasks=["captioning", "vqa"], meteor=False,
                max_new_tokens=24, device="cpu", resamples=50, attention_images=2,
            )
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def compared(runs):
    assert main(["compare", str(runs / "blind"), str(runs / "seeing"), "--out", str(runs / "out")]) == 0
    return runs / "out"


def test_differences_are_seen(compared, runs):
    result = json.loads((compared / "compare.json").read_text())
    cider = result["metrics"]["CIDEr"]
    values = [json.loads((runs / n / "metrics.json").read_text())["captioning"]["CIDEr"] for n in ("blind", "seeing")]
    assert [cider["a"], cider["b"]] == pytest.approx(values)
    assert cider["low"] > 0 and cider["p_value"] < 0.01 and cider["b_is"] == "better"
    assert result["metrics"]["VQA accuracy"]["b_is"] == "better" and result["counts"]["images"] == 24
    gains = [abs(item["cider_b"] - item["cider_a"]) for item in result["changed_most"]]
    assert gains == sorted(gains, reverse=True) and gains[0] > 1


def test_the_same_run_does_not_differ_from_itself(runs, tmp_path):
    compare(CompareSettings(run_a=str(runs / "seeing"), run_b=str(runs / "seeing"), out=str(tmp_path)))
    result = json.loads((tmp_path / "compare.json").read_text())
    assert all(row["difference"] == 0 and row["b_is"] == "no difference seen" for row in result["metrics"].values())
    assert result["counts"]["same_caption"] == 24


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_page_in_chromium(compared, width):
    script = r"""
      found.ready = document.documentElement.dataset.ready;
      found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      found.sections = [...document.querySelectorAll("section h2")].map((n) => n.textContent);
      found.rows = document.querySelectorAll("#differences tbody tr").length;
      found.images = document.querySelectorAll("#grid img").length;
      const order = document.getElementById("order");
      order.value = "A better"; order.dispatchEvent(new Event("change"));
      found.first = document.querySelector("#grid .pair").textContent;
      const canvas = document.querySelector("#attention canvas"), before = canvas.toDataURL();
      document.querySelectorAll("#attention .words button")[1].click();
      found.changed = canvas.toDataURL() !== before;
      found.views = document.querySelectorAll("#attention canvas").length;
      found.odd = /\[object |undefined|NaN/.test(document.querySelector("main").textContent);
    """
    found = browse(compared / "compare.html", script, width)
    assert found["errors"] == [] and found["console"] == []
    assert found["ready"] == "yes" and found["wide"] <= 0 and found["views"] == 4
    assert found["sections"] == ["Differences", "Images whose captions changed most", "Attention"]
    assert found["rows"] >= 9 and found["images"] == 24 and found["first"].startswith("A ")
    assert found["changed"] and not found["odd"]


def test_what_cannot_be_compared_is_said(runs, tmp_path, capsys):
    assert main(["compare", str(tmp_path), str(runs / "seeing")]) == 1
    assert "is not a finished evaluation" in capsys.readouterr().err
    a, b = read_run(str(runs / "blind")), read_run(str(runs / "seeing"))
    key = next(iter(b.captions))
    b.captions[key] = b.captions[key] | {"references": ["another"]}
    with pytest.raises(UserError, match="different references"):
        paired_statistics(a, b)
    b.captions, b.answers = {}, {}
    with pytest.raises(UserError, match="no image in common"):
        paired_statistics(a, b)


def test_every_kind_of_metric_is_paired(tmp_path):
    said = {
        "a": {"rank": 7, "right": 0.0, "hallucinated": ["cat"], "encoder": "x", "CLIPScore": 0.5},
        "b": {"rank": 1, "right": 1.0, "hallucinated": [], "encoder": "x", "CLIPScore": 0.7},
        "c": {"rank": 1, "right": 1.0, "hallucinated": [], "encoder": "y", "CLIPScore": 0.7},
    }
    runs = {}
    for name, own in said.items():
        rows = []
        for i in range(12):
            caption = {"id": f"{i}", "caption": "a dog\u2028", "references": ["a dog"], "CLIPScore": own["CLIPScore"]}
            ranks = {"image_to_text_rank": own["rank"], "text_to_image_ranks": [own["rank"], 1]}
            rows.append(caption | ranks | {"mentions": 2, "hallucinated": own["hallucinated"]})
            rows.append({"id": f"{i}", "prompt": "Is there a dog?", "pope": "random", "right": own["right"]})
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name / "predictions.jsonl").write_text(lines)
        captioning = {"tokenizer": "python", "METEOR": None, "similarity_encoder": own["encoder"]}
        (tmp_path / name / "metrics.json").write_text(json.dumps({"captioning": captioning}))
        runs[name] = read_run(str(tmp_path / name))
    pairs, _ = paired_statistics(runs["a"], runs["b"])
    found = {name: (round(a.value, 3), round(b.value, 3)) for name, (a, b) in pairs.items()}
    assert found["image_to_text.R@1"] == (0, 1) and found["image_to_text.R@10"] == (1, 1)
    assert found["text_to_image.R@5"] == (0.5, 1)
    assert found["POPE random"] == (0, 1) and found["CLIPScore"] == (0.5, 0.7)
    assert found["CHAIR_i"] == (0.5, 0) and found["CHAIR_s"] == (1, 0)
    # image-text similarity by another encoder is another metric
    assert "CLIPScore" not in paired_statistics(runs["a"], runs["c"])[0]


def test_verdicts_know_which_way_is_better():
    assert verdict("CIDEr", 0.1, 0.2) == "better" and verdict("CIDEr", -0.2, -0.1) == "worse"
    assert verdict("cut_off", 0.1, 0.2) == "worse" and verdict("hallucinated_objects", -0.2, -0.1) == "better"
    assert verdict("length", 0.1, 0.2) == "different" and verdict("CIDEr", -0.1, 0.2) == "no difference seen"
