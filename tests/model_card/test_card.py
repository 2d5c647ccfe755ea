"""The model card: made of what was measured, valid by the Hub's own classes, nothing left to fill in."""

import dataclasses
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from blipren.model_card.build import CardSources, build_card, check_card
from blipren.model_card.facts import strictness, without_folders
from blipren.training.errors import UserError
from tests.hub.checkpoint_files import write_checkpoint, write_evaluation, write_run


@pytest.fixture
def sources(tmp_path):
    model = write_run(write_checkpoint(tmp_path / "run"))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "cache.json").write_text(json.dumps({"counts": {"train": 1800, "rejected": 3}}))
    licenses = {"vision": "apache-2.0", "llm": "llama3.2"}
    return CardSources(model, model, write_evaluation(tmp_path / "evaluation"), cache, base_licenses=licenses)


def test_the_card_holds_what_the_run_left(sources):
    files = build_card("user/thing", sources)
    text = files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "llama3.2"
    assert card.data.base_model == ["org/vision", "org/llm"]
    assert card.data.datasets == ["org/photos"]
    (widget,) = card.data.widget
    assert widget["src"] == "https://huggingface.co/user/thing/resolve/main/pictures/example.png"
    space = "[the demo of this model](https://huggingface.co/spaces/user/thing)"
    assert space not in text
    with_space = build_card("user/thing", dataclasses.replace(sources, space=True))
    assert space in with_space["README.md"].decode()
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["CIDEr"].metric_value == 0.3123
    assert results["CIDEr"].metric_args == {"interval_95": [0.29, 0.335]}
    assert results["accuracy"].task_type == "visual-question-answering"
    for line in (
        "| captioning | CIDEr | 0.3123 | 0.2900 to 0.3350 | 500 |",
        "The strictest licence among the parts is **llama3.2** (language model).",
        "| learning rate | 0.0001 |",
        "| best validation loss | 2.4000 at update 20 |",
        "| train | 1,800 |",
        "| rejected | 3 |",
        "`hallucinated_objects` is 0.125",
        "Decoding: max_new_tokens 30, num_beams 3.",
        "Training took 3.0 minutes. Hardware: CPU, 2 threads. Energy was not measured.",
        "![Training and validation loss](pictures/curves.png)",
        "![Held-out images with their captions](pictures/samples.png)",
        "![A held-out image with the attention map of each word of its caption](pictures/attention.png)",
        "blipren demo user/thing",
        "| connector | this training run | 65.5K | trained | apache-2.0 |",
    ):
        assert line in text, line
    assert "{" not in text.split("```bibtex")[0].replace('[{"generated_text": ...}]', "").split("---", 2)[2]
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/captioning.yaml"]))
    assert {e.task_id: e.value for e in entries}["CIDEr"] == 0.3123
    assert set(files) == {
        "README.md",
        "pictures/attention.png",
        "pictures/curves.png",
        "pictures/example.png",
        "pictures/samples.png",
        ".eval_results/captioning.yaml",
        ".eval_results/vqa.yaml",
    }


def test_scales_and_frames_are_in_the_summary_and_the_command(sources):
    path = sources.model / "config.json"
    config = json.loads(path.read_text()) | {"vision_scales": [1, 2], "vision_join": "sequence", "num_frames": 8}
    config["qformer_config"] |= {"num_query_tokens": 4, "time_embedding": "seconds", "time_embedding_scale": 3.0}
    path.write_text(json.dumps(config))
    text = build_card("user/thing", sources)["README.md"].decode()
    assert "images and videos (of which it sees 8 frames)" in text and "sees the image at scales 1, 2" in text
    assert re.search(
        r"time_embedding_scale: 3.0.*--scales 1 2 --scale-join sequence --frames 8 --time-embedding sec", text
    )


def test_the_hub_accepts_the_card(sources, hub):
    from huggingface_hub import HfApi

    text = build_card("user/thing", sources)["README.md"].decode()
    ModelCard(text).validate()
    HfApi(endpoint=hub.url)._validate_yaml(text)


def test_without_run_and_evaluation_nothing_is_claimed(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    text = build_card("user/thing", CardSources(model))["README.md"].decode()
    assert "## Results" not in text and "## Training" not in text and "Time and energy" not in text
    assert "Hallucination and bias were not measured" in text
    assert ModelCard(text).data.eval_results is None
    assert ModelCard(text).data.license == "other"
    assert "was not found: ask its authors" in text


def test_no_local_name_gets_into_the_card(tmp_path):
    base = tmp_path / "towers" / "vision"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    bases = {"vision": {"id": str(base)}, "llm": {"id": "org/llm", "revision": "b" * 40}}
    model = write_checkpoint(tmp_path / "model", bases)
    (model / "settings.yaml").write_text(f"cache: {tmp_path}/cache=2,{tmp_path}/more=1\nbatch_size: 4\n")
    evaluation = write_evaluation(tmp_path / "evaluation", dataset=str(tmp_path / "photos"))
    files = build_card("user/thing", CardSources(model, model, evaluation))
    text = files["README.md"].decode()
    assert str(tmp_path) not in text and "`vision`, a local folder" in text
    assert ModelCard(text).data.base_model == ["org/llm"]
    assert "| vision encoder | `vision`, a local folder | 32.8K | frozen | mit |" in text
    assert ModelCard(text).data.eval_results[0].dataset_name == "photos"
    assert ModelCard(text).data.datasets is None
    assert not [name for name in files if name.startswith(".eval_results")]
    assert without_folders(f"{tmp_path}/cache=2,org/photos") == "cache=2,org/photos"


def test_licences_are_ranked_and_unknown_ones_are_not_free():
    assert strictness("mit") < strictness("openrail") < strictness("gemma") < strictness("cc-by-nc-4.0")
    assert strictness("a-licence-nobody-knows") == strictness("other") > strictness("apache-2.0")


@pytest.mark.parametrize("fault", ["TODO: describe", "{{ summary }}", "[More Information Needed]"])
def test_a_placeholder_is_refused(fault, sources):
    text = build_card("user/thing", sources)["README.md"].decode()
    check_card(text)
    with pytest.raises(UserError, match="still holds"):
        check_card(text.replace("## Limits", f"## Limits\n\n{fault}"))


def test_damaged_sources_are_named(sources):
    (sources.evaluation / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="metrics.json is not JSON"):
        build_card("user/thing", sources)
    (sources.evaluation / "metrics.json").unlink()
    with pytest.raises(UserError, match="has no metrics.json"):
        build_card("user/thing", sources)


def test_pictures_are_left_out_on_request(sources):
    files = build_card("user/thing", dataclasses.replace(sources, pictures=False))
    assert not [name for name in files if name.startswith("pictures/")]
    assert "pictures/" not in files["README.md"].decode()


def test_the_card_of_a_real_run(tmp_path, monkeypatch):
    """new, embed, train and evaluate on two dozen pictures: everything that the card can say, it finds where they put it."""
    from blipren.training.cli import main
    from tests.hub.tiny import TINY_QFORMER, picture, write_llm, write_vision

    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = []
    for number in range(24):
        picture(number).save(photos / f"{number}.png")
        split = "train" if number < 16 else "validation" if number < 20 else "test"
        captions = [f"a red ball number {number}", "two dogs run on a beach"]
        rows.append({"file_name": f"{number}.png", "captions": captions, "split": split})
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_vision(tmp_path / "vision")
    write_llm(tmp_path / "llm")
    for part, license_name in (("vision", "apache-2.0"), ("llm", "gemma")):
        (tmp_path / part / "README.md").write_text(f"---\nlicense: {license_name}\n---\n")
    small = ["--qformer", json.dumps(TINY_QFORMER)]
    commands = (
        ["new", "model", "--vision", "vision", "--llm", "llm", "--queries", "4", *small],
        ["embed", "model", "photos", "cache", "--caption-columns", "captions"],
        ["train", "model", "cache", "run", "--max-steps", "4", "--batch-size", "4", "--device", "cpu"],
        ["evaluate", "run", "photos", "evaluation", "--max-new-tokens", "8", "--resamples", "50"],
    )
    for command in commands:
        assert main(command) == 0, command
    run = tmp_path / "run"
    files = build_card("user/thing", CardSources(run, run, tmp_path / "evaluation", tmp_path / "cache"))
    text = files["README.md"].decode()
    card = ModelCard(text).data
    assert card.license == "gemma" and "The strictest licence among the parts is **gemma** (language model)." in text
    names = {result.metric_name for result in card.eval_results}
    assert {"CIDEr", "BLEU-4", "ROUGE-L"} <= names and all(r.metric_args for r in card.eval_results)
    for pattern in (
        r"\| train \| 16 \|",
        r"\| rejected \| 0 \|",
        r"\| optimizer updates \| 4 \|",
        r"\| best validation loss \| [\d.]+ at update 4 \|",
        r"Training took [\d.]+ minutes\. Hardware: ",
        r"Whether the model uses its image, measured: ",
        r"!\[Held-out images with their captions\]\(pictures/samples.png\)",
        r"!\[Training and validation loss\]\(pictures/curves.png\)",
        r"```bash\nblipren new my-vlm --vision vision --llm llm --connector qformer --projector \w+ --queries 4 --qformer '{hidden_size: [^\n]*}'\n"
        r"blipren embed my-vlm photos cache\nblipren train my-vlm cache run [^\n]*--batch-size 4[^\n]*--max-steps 4[^\n]*\n```",
    ):
        assert re.search(pattern, text), (pattern, text)
    assert str(tmp_path) not in text
    pictures = {f"pictures/{name}.png" for name in ("samples", "curves", "attention", "example")}
    assert pictures <= set(files)
