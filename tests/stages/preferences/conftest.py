"""A tiny full model with a chat template, drawn pictures with captions and questions, and their feature cache."""

import json
import shutil

import pytest

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from tests import tiny_models
from tests.stages.tools import make_model

pytest.importorskip("trl", reason="TRL is an extra: pip install blipren[trl]")


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory, bases):
    """Without dropout, so that a forward is the same whoever calls it."""
    folder = tmp_path_factory.mktemp("policy")
    llm = tiny_models.make_llm(folder / "llm", chat=True)
    qformer = tiny_models.QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {"projector_dropout": 0.0}
    bridge = make_model(folder / "bridge", bases[0], llm, qformer=qformer, projector_options=options)
    BliprenForConditionalGeneration.from_pretrained(bridge).save_pretrained(folder / "full")
    BliprenProcessor.from_pretrained(bridge).save_pretrained(folder / "full")
    return folder / "full"


@pytest.fixture(scope="session")
def policy_cache(tmp_path_factory, policy_dir, dataset_dir):
    cache = tmp_path_factory.mktemp("policy-cache") / "cache"
    embed(EmbedSettings(model=str(policy_dir), dataset=str(dataset_dir), cache=str(cache), dtype="float32", workers=0))
    return cache


@pytest.fixture(scope="session")
def pair_dir(tmp_path_factory, dataset_dir):
    """The same pictures with preferences about them: up to three a picture, of answers of different length."""
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    shutil.copytree(dataset_dir, folder)
    rows = map(json.loads, (dataset_dir / "metadata.jsonl").read_text().splitlines())
    lines = []
    for number, row in enumerate(rows):
        wrong = "green" if row["answer"] != "green" else "blue"
        pairs = [
            ("What colour ?", row["answer"], wrong),
            ("What is it ?", row["caption"][0], f"A {wrong} thing of no shape at all ."),
            ("Describe", "the small " + row["caption"][0], "no"),
        ][: 1 + number % 3]
        for k, (prompt, chosen, rejected) in enumerate(pairs):
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "id": f"{number}-{k}"}
            lines.append(json.dumps({"file_name": row["file_name"], "split": row["split"], **pair}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def pair_rows(pair_dir):
    """Its rows by id."""
    return {r["id"]: r for r in map(json.loads, (pair_dir / "metadata.jsonl").read_text().splitlines())}


@pytest.fixture(scope="session")
def pair_cache(tmp_path_factory, policy_dir, pair_dir):
    cache = tmp_path_factory.mktemp("pair-cache") / "cache"
    embed(EmbedSettings(model=str(policy_dir), dataset=str(pair_dir), cache=str(cache), dtype="float32", workers=0))
    return cache
