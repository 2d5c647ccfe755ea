"""The evaluate command: whole split, deterministic, restartable, and a verdict on whether the model looks."""

import csv
import json

import pytest

from blipren.training.cli import main
from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.data.sources.splits import split_by_hash
from blipren.training.errors import UsageError, UserError
from blipren.training.evaluation import inference
from blipren.training.evaluation.evaluate import evaluate
from blipren.training.evaluation.examples import open_split
from blipren.training.evaluation.generation import load_model
from blipren.training.evaluation.image_use import HARDLY, IGNORES, USES, image_use, other_images, verdict
from tests.evaluation.conftest import colour_picture


def run(model, dataset, out, **options) -> dict:
    options = {"tasks": ["captioning", "vqa"], "meteor": False, "report": False, "max_new_tokens": 24, **options}
    evaluate(EvaluateSettings(model=str(model), dataset=str(dataset), out=str(out), device="cpu", **options))
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def seen(seeing, colours, tmp_path_factory):
    out = tmp_path_factory.mktemp("seen")
    return run(seeing, colours, out), out


def test_a_model_that_sees(seen):
    metrics, out = seen
    assert metrics["split"] == "test" and metrics["counts"]["images"] == 24 and metrics["counts"]["rejected"] == {}
    assert metrics["counts"]["references"] == 48 and metrics["counts"]["rows"] == {"train": 6, "test": 24}
    captioning = metrics["captioning"]
    assert captioning["CIDEr"] > 2 and captioning["METEOR"] is None and captioning["cut_off"] == 0
    low, high = captioning["intervals"]["CIDEr"]
    assert low <= captioning["CIDEr"] <= high
    assert metrics["vqa"]["accuracy"] > 0.9 and metrics["vqa"]["questions"] == 24
    use = metrics["image_use"]
    assert use["verdict"] == USES
    assert use["loss"]["right"] < use["loss"]["shuffled"] and set(use["loss"]) == {
        "right",
        "shuffled",
        "black",
        "none",
    }
    assert use["CIDEr"]["right"] > 2 * use["CIDEr"]["shuffled"]
    assert use["VQA accuracy"]["right"] > use["VQA accuracy"]["shuffled"]
    assert metrics["versions"]["torch"] and metrics["settings"]["max_new_tokens"] == 24
    assert not (out / "partial.jsonl").exists()


def test_predictions_are_written_twice_over(seen):
    metrics, out = seen
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 48 and {row["id"] for row in rows} == {f"{i:03d}.png" for i in range(6, 30)}
    caption, answer = rows[0], rows[1]
    assert caption["prompt"] == "Short caption:" and len(caption["references"]) == 2 and caption["ended_by_eos"]
    assert answer["prompt"].startswith("What colour") and answer["exact"] in (0.0, 1.0)
    scores = [row["CIDEr"] for row in rows if "CIDEr" in row]
    assert sum(scores) / len(scores) == pytest.approx(metrics["captioning"]["CIDEr"], abs=1e-5)
    with (out / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["caption"] for row in table] == [row["caption"] for row in rows]


def test_a_model_whose_image_path_is_cut_is_caught(blind, colours, tmp_path, capsys):
    metrics = run(blind, colours, tmp_path)
    use = metrics["image_use"]
    assert use["verdict"] == IGNORES and abs(use["loss_gap"]["value"]) < 1e-5
    assert metrics["captioning"]["unique_captions"] == pytest.approx(1 / 24)
    assert "the model ignores its image" in capsys.readouterr().out


def test_an_untrained_model_ignores_its_image(untrained, colours, tmp_path):
    metrics = run(untrained, colours, tmp_path, tasks=["captioning"], max_new_tokens=5)
    assert metrics["image_use"]["verdict"] in (IGNORES, HARDLY) and metrics["captioning"]["cut_off"] > 0.5


def test_a_killed_run_goes_on_to_the_same_result(seen, seeing, colours, tmp_path, monkeypatch, capsys):
    original, calls = inference.run_chunk, []

    def counting(model, processor, examples, plan, black):
        calls.append([e.id for e in examples])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(model, processor, examples, plan, black)

    plan = inference.InferencePlan(questions=True, generation={"max_new_tokens": 24, "num_beams": 1}, chunk=8)
    model, processor = load_model(str(seeing), "cpu")
    split = open_split(str(colours))
    whole = inference.run_inference(model, processor, split, plan, tmp_path / "whole.jsonl", "w")
    monkeypatch.setattr(inference, "run_chunk", counting)
    with pytest.raises(KeyboardInterrupt):
        inference.run_inference(model, processor, split, plan, tmp_path / "partial.jsonl", "w")
    with (tmp_path / "partial.jsonl").open("a") as file:
        file.write('{"id": "014.png", "caption": {"te')  # killed while writing
    calls.append("resumed")
    resumed = inference.run_inference(model, processor, split, plan, tmp_path / "partial.jsonl", "w")
    after = calls[calls.index("resumed") + 1 :]
    assert [len(c) for c in after] == [8, 8] and after[0][0] == "014.png"
    assert resumed == whole
    assert "resuming after 8 images" in capsys.readouterr().out
    assert not inference.read_partial(tmp_path / "partial.jsonl", "another fingerprint")


def test_the_same_command_gives_the_same_files(seen, seeing, colours, tmp_path):
    _, out = seen
    run(seeing, colours, tmp_path)
    assert (tmp_path / "predictions.jsonl").read_bytes() == (out / "predictions.jsonl").read_bytes()


def test_unreadable_photos_are_counted(seeing, colours, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in colours.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "010.png").write_bytes(b"not a picture")
    (folder / "011.png").unlink()
    metrics = run(seeing, folder, tmp_path / "out", tasks=["captioning"])
    assert metrics["counts"]["images"] == 22
    assert metrics["counts"]["rejected"] == {"unreadable": 1, "missing_file": 1}


def test_captions_can_be_given(colours, tmp_path):
    rows = [json.loads(line) for line in (colours / "metadata.jsonl").read_text().splitlines()]
    given = tmp_path / "given.json"
    given.write_text(json.dumps({row["file_name"]: row["captions"][1] for row in rows}))
    metrics = run("-", colours, tmp_path / "out", tasks=["captioning"], predictions=str(given))
    assert metrics["captioning"]["BLEU-4"] == pytest.approx(1) and "image_use" not in metrics
    given.write_text(json.dumps({"006.png": "a"}))
    with pytest.raises(UserError, match="23 of the 24 images have no caption there, such as '007.png'"):
        run("-", colours, tmp_path / "out", tasks=["captioning"], predictions=str(given))


def test_an_evaluation_is_what_was_before_and_can_be_scored_again(seen, seeing, colours, tmp_path):
    metrics, out = seen
    again = run(seeing, colours, tmp_path / "out", tasks=["captioning"], before=str(out), probe=False)
    assert again["before"]["captioning"]["CIDEr"] == pytest.approx(metrics["captioning"]["CIDEr"])
    # its lines of answers are no captions
    scored = run("-", colours, tmp_path / "o", tasks=["captioning"], predictions=str(out / "predictions.jsonl"))
    assert scored["captioning"]["CIDEr"] == pytest.approx(metrics["captioning"]["CIDEr"])


def test_human_captions_come_out_of_the_command(shared_data, tmp_path):
    human = json.loads((shared_data("metric-reference") / "flickr8k_human" / "human_leave_one_out.json").read_text())
    images = shared_data("flickr8k-mini") / "images"
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(images)
    rows = [{"file_name": f"images/{k}", "captions": v, "split": "test"} for k, v in human["references"].items()]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = tmp_path / "human.jsonl"
    lines = [json.dumps({"id": f"images/{k}", "caption": v}) for k, v in human["hypotheses"].items()]
    given.write_text("\n".join(lines))
    out = tmp_path / "out"
    status = main(["evaluate", "-", str(data), str(out), "--predictions", str(given), "--no-report"])
    assert status == 0
    captioning = json.loads((out / "metrics.json").read_text())["captioning"]
    for name, value in {"CIDEr": 0.8031, "BLEU-4": 0.2101, "ROUGE-L": 0.4829, "METEOR": 0.2464}.items():
        if captioning[name] is None:
            assert name == "METEOR" and any("needs Java" in note for note in captioning["notes"])
        else:
            assert captioning[name] == pytest.approx(value, abs=1e-4), name
    assert captioning["images"] == 500 and captioning["references"] == 2000


def test_wrong_use_is_named(colours, seeing, tmp_path, capsys):
    with pytest.raises(UsageError, match="each must be one of captioning, vqa, choice, retrieval, pope"):
        EvaluateSettings(model="m", dataset="d", out="o", tasks=["caption"])
    with pytest.raises(UsageError, match="go with --tasks captioning alone"):
        EvaluateSettings(model="m", dataset="d", out="o", tasks=["vqa"], predictions="p")
    assert main(["evaluate", str(seeing), str(colours), str(tmp_path / "o"), "--split", "night"]) == 1
    assert "split 'night' is none of train, validation, test" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), str(colours), str(tmp_path / "o")]) == 1
    assert "has no config.json" in capsys.readouterr().err
    assert main(["evaluate", str(seeing), str(colours), str(tmp_path / "o"), "--tasks", "pope"]) == 1
    assert "neither `objects`" in capsys.readouterr().err
    assert main(["evaluate", str(seeing), str(colours), str(tmp_path / "o"), "--tasks", "retrieval"]) == 1
    assert "does not load" in capsys.readouterr().err


def test_splits_are_those_of_embed(colours, tmp_path):
    """Without a split column the image's content decides, with the shares that embed was told; nothing is judged twice."""
    folder = tmp_path / "unsplit"
    folder.mkdir()
    rows = []
    for i in range(30):
        colour_picture(i, (40, 32 + i)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "captions": ["a"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = {"validation_share": 0.3, "test_share": 0.3}
    parts = {name: open_split(str(folder), name, **shares) for name in ("train", "validation", "test")}
    ids = {name: {e.id for e in part.examples} for name, part in parts.items()}
    assert sum(map(len, ids.values())) == 30 and len(set.union(*ids.values())) == 30 and all(ids.values())
    assert open_split(str(folder), **shares).name == "test"
    for example in parts["test"].examples:
        assert split_by_hash(example.row.image_hash(), 0.3, 0.3) == "test"
    with pytest.raises(UserError, match="split 'validation' has no images"):
        open_split(str(colours), "validation")
    only_train = tmp_path / "train"
    only_train.mkdir()
    colour_picture(0).save(only_train / "0.png")
    (only_train / "metadata.jsonl").write_text(json.dumps(rows[0] | {"split": "train"}))
    assert open_split(str(only_train)).name == "train"


def test_verdicts():
    assert verdict(3.0, 0.5, 0.4) == USES
    assert verdict(3.0, 0.06, 0.05) == HARDLY
    assert verdict(3.0, 0.06, 0.05, score_kept=0.9) == HARDLY and verdict(3.0, 0.06, 0.05, score_kept=0.2) == USES
    assert verdict(3.0, 0.001, -0.1, score_kept=0.2) == IGNORES
    assert verdict(3.0, 0.5, -0.1) == IGNORES
    assert verdict(3.0, 0.01, 0.009) == IGNORES
    assert sorted(other_images(5, 0)) == [0, 1, 2, 3, 4] and all(a != b for a, b in enumerate(other_images(5, 3)))
    assert other_images(1, 0) == []
    single = image_use({"right": [(1.0, 2)]}, {})
    assert single["verdict"] == "unknown"


def test_chunks_never_leave_one_image_alone():
    assert [list(c) for c in inference.split_into_chunks(5, 2)] == [[0, 1], [2, 3, 4]]
    assert [len(c) for c in inference.split_into_chunks(256, 128)] == [128, 128]
    assert [len(c) for c in inference.split_into_chunks(1, 128)] == [1]
