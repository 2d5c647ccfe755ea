"""Every setting of `blipren train` does something: a changed one changes the weights, the log or the files of a run.
Those that are other ways to the same weights (`SAME`) leave them; test_precision.py and test_tuning.py show what they do.

`pytest -m slow` runs them all; the table itself is checked always, so that a new setting cannot be left out.
"""

import dataclasses
import hashlib
import json

import pytest

from blipren.training.commands.train import TrainSettings
from blipren.training.stages import train as caption
from tests.stages.tools import make_model

CHANGES = {
    "train_qformer": False, "max_steps": 5, "batch_size": 16, "micro_batches": 2, "answers_per_image": 1,
    "max_answer_tokens": 3, "shared_prefix": False, "row_tokens": 400, "learning_rate": 1e-3,
    "learning_rates": {"projector": 1e-2}, "weight_decay": 0.5, "adam_betas": [0.8, 0.9], "warmup": 3,
    "schedule": "linear", "min_learning_rate": 0.5, "clip": 0.1, "label_smoothing": 0.1, "fused_loss": True,
    "word_dropout": 0.3, "feature_dropout": 0.3, "feature_noise": 0.3, "likelihood_weight": 0.5,
    "experiments": {"bag_of_words": {"weight": 0.1}}, "ema": 0.5, "eval_every": 2, "save_every": 2, "keep_checkpoints": 1,
    "keep_best": "CIDEr", "generate_samples": 2, "log_every": 1, "precision": "bf16", "attention": "eager", "seed": 1,
    "full": True, "llm_tuning": "lora", "optimizer": "muon",
}  # fmt: skip
ON_TOP_OF = {  # settings that speak of another one: (what is on in both runs, the change)
    "epochs": ({"max_steps": None, "epochs": 2.0}, 1.0),
    "muon_momentum": ({"optimizer": "muon"}, 0.5),
    "muon_learning_rate": ({"optimizer": "muon"}, 1e-2),
    "lora_rank": ({"llm_tuning": "lora"}, 4),
    "lora_alpha": ({"llm_tuning": "lora"}, 4.0),
    "lora_dropout": ({"llm_tuning": "lora"}, 0.5),
    "lora_targets": ({"llm_tuning": "lora"}, ["q_proj"]),
    "merge_lora": ({"llm_tuning": "lora", "full": True}, True),
    "train_connector": ({"llm_tuning": "lora"}, False),
    "num_beams": ({"keep_best": "CIDEr"}, 3),
    "length_penalty": ({"keep_best": "CIDEr", "num_beams": 3, "max_new_tokens": 12}, -3.0),
    "max_new_tokens": ({"keep_best": "CIDEr", "num_beams": 3, "length_penalty": 5.0}, 12),
    "patience": ({"eval_every": 1, "learning_rate": 1e-30, "weight_decay": 0.0}, 1),
    "router_balance_weight": ({"model": "moe"}, 1.0),
    "router_z_weight": ({"model": "moe"}, 1.0),
    "router_noise": ({"model": "moe"}, 1.0),
    "augment": ({"online": True}, True),
    "train_vision": ({"online": True}, True),
    "caption_columns": ({"online": True}, ["short_caption"]),
}
EXPERIMENTS = [  # (what is on in both runs, what is on in one)
    ({}, {"consensus": {"captions": 2}}),
]
SAME = {"compile": True, "gradient_checkpointing": True, "workers": 1}  # other ways to the same weights
ELSEWHERE = {
    "model", "cache", "out", "device", "online",  # in all tests of this folder
    "llm_bits", "compile_backend", "report_to", "push_to", "public", "fsdp", "deepspeed",  # test_train.py, test_tuning.py, test_push.py, test_processes.py
    "image_column", "question_column", "answer_column", "id_column", "split_column", "status_column",  # ../data/sources
    "grounding", "bbox_format",  # ../data/sources/test_boxes.py
    "traces",  # test_conversations.py
    "dataset_config", "streaming", "follow_links", "validation_share", "test_share",  # ../data/sources
}  # fmt: skip


def test_no_setting_is_left_out():
    named = [*CHANGES, *ON_TOP_OF, *SAME, *ELSEWHERE]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(TrainSettings))


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory, bases):
    return make_model(tmp_path_factory.mktemp("moe") / "model", *bases, projector="moe")


@pytest.fixture(scope="module")
def runs():
    """What runs left, by their settings: each is made once."""
    return {}


@pytest.fixture
def left_by(settings, runs, tmp_path, model_dir, moe_dir, dataset_dir):
    """Function from settings to (weights, log, names of files) of their run."""

    def run(**changes):
        key = repr(sorted(changes.items()))
        if key not in runs:
            out = tmp_path / str(len(runs))
            if changes.get("model") == "moe":
                changes["model"] = str(moe_dir)
            if changes.get("online"):
                changes["cache"] = str(dataset_dir)
            caption.train(settings(**changes | {"out": str(out)}))
            files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
            saved = sorted(name for name in files if name.endswith(".safetensors") and "checkpoints" not in name)
            weights = b"".join((out / name).read_bytes() for name in saved)
            log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            clocked = {"seconds", "tokens_per_second", "images_per_second", "tflops", "time"}
            kept = [{k: v for k, v in event.items() if k not in clocked} for event in log]
            runs[key] = hashlib.sha256(weights).hexdigest(), kept, files
        return runs[key]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHANGES, *ON_TOP_OF])
def test_a_setting_does_something(left_by, name):
    around, value = ON_TOP_OF.get(name) or ({}, CHANGES[name])
    assert left_by(**around) != left_by(**around | {name: value})


@pytest.mark.slow
@pytest.mark.parametrize("around, change", EXPERIMENTS)
def test_an_experiment_and_its_settings_do_something(left_by, around, change):
    assert left_by(experiments=around) != left_by(experiments=change)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_a_setting_leaves_the_weights_as_they_are(left_by, name):
    extra = {"compile_backend": "aot_eager"} if name == "compile" else {}
    assert left_by()[:2] == left_by(**{name: SAME[name]} | extra)[:2]
