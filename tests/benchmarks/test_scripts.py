"""Benchmarks at toy size: they run, their arms agree, and their JSON holds what their text says."""

import json
from pathlib import Path

from tests.common.processes import process_server

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str, out: Path) -> dict:
    """Run a script of benchmarks/. Returns its JSON."""
    words = [*map(str, arguments), "--out", str(out)]
    program = process_server().start(words, out.with_suffix(".txt"), program=str(BENCHMARKS / script))
    output, _ = program.communicate()
    assert program.returncode == 0, output
    return json.loads(out.read_text())


def test_train(tmp_path):
    arguments = "--shape tiny --images 2 --captions 2 --rounds 1 --threads 1 --fused --profile".split()
    report = run("train.py", *arguments, out=tmp_path / "train.json")
    arms = report["arms"]  # the script itself refuses arms that differ in loss
    assert set(arms) == {"notebook", "blip2_pixels", "blip2_features", "padded", "shared", "shared_fused"}
    assert abs(arms["shared_fused"]["loss"] - arms["shared"]["loss"]) < 1e-4
    assert arms["notebook"]["flops"] > arms["padded"]["flops"] > arms["shared"]["flops"]
    assert abs(sum(report["profile"].values()) - 1) < 1e-6


def test_startup(tmp_path):
    report = run("startup.py", "--rounds", "1", out=tmp_path / "startup.json")
    assert min(report["seconds"].values()) > 0 and report["bar"] > 0.2


def test_chat(tmp_path):
    report = run(
        "chat.py", "--shape", "tiny", "--images", "2", "--steps", "1", "--threads", "1", out=tmp_path / "chat.json"
    )
    for kind, arms in report["kinds"].items():  # the script itself refuses arms that differ in loss
        assert abs(arms["trl"]["loss"] - arms["blipren"]["loss"]) < 1e-5, kind
        assert arms["ratios"]["flops"] > 1


def test_preferences(tmp_path):
    arguments = "--shape tiny --images 2 --pairs 2 --steps 1 --threads 1 --completion-tokens 4".split()
    report = run("preferences.py", *arguments, out=tmp_path / "preferences.json")
    dpo, grpo = report["dpo"], report["grpo"]  # the script itself refuses arms of dpo that differ in loss
    assert abs(dpo["trl"]["loss"] - dpo["blipren"]["loss"]) < 1e-5
    assert dpo["ratios"]["flops"] > dpo["with_reference"]["flops"] > 1 and grpo["ratios"]["flops"] > 1


def test_notes(tmp_path):
    report = run("notes.py", "--texts", "24", out=tmp_path / "notes.json")
    assert report["How many shapes are on the left?"]["right"] == 1
    pairs = ("How many shapes are on the right?", "What is only on the right?")
    assert sum(report[question]["asked"] for question in pairs) == 24


def test_places(tmp_path):
    figures = run("places.py", "--share", "0.1", "--steps", "200", out=tmp_path / "places.json")
    alone, read = (figures[f"{name}, MLP, seen"]["mean error"] for name in ("place in the grid", "features and place"))
    assert read < 0.9 * alone


def test_scales(tmp_path):
    figures = run("scales.py", "--shape", "tiny", "--images", "2", "--rounds", "1", out=tmp_path / "scales.json")
    assert set(figures["visual_tokens"].values()) == {4}
    assert all(seconds > 0 for kinds in figures["seconds"].values() for seconds in kinds.values())


def test_memory_of_several_images(tmp_path):
    figures = run("scales.py", "--shape", "tiny", "--several", "1", "3", out=tmp_path / "several.json")
    kept = figures["bytes_an_image"]
    assert kept == {"keys and values": 4 * 2 * 2 * 24 * 4, "image features": 4 * 48 * 4, "patch features": 16 * 48 * 4}


def test_memory(tmp_path):
    report = run("memory.py", "--entries", "50", "--width", "8", "--queries", "4", out=tmp_path / "memory.json")
    (figures,) = report["results"]
    assert figures["entries"] == 50 and figures["bytes"]["embeddings.safetensors"] > 50 * 8 * 2
    assert min(figures["processor milliseconds a query"].values()) > 0


def test_time_to_quality(tmp_path):
    arguments = (
        "scenes --scenes 8 --validation-scenes 4 --steps 1 --reranker-steps 1 --notebook-epochs 1 --timed-steps 1"
    )
    report = run("time_to_quality.py", *arguments.split(), out=tmp_path / "quality.json")
    assert report["notebook"]["steps"] > 0 and report["notebook"]["seconds"] > 0
    ways = report["ours"]
    assert [(way["steps"], way["with"]) for way in ways] == [(1, "alone"), (1, "reranker"), (1, "memory")]
    assert 0 < ways[0]["seconds"] < min(ways[1]["seconds"], ways[2]["seconds"]) and ways[2]["cider"] > ways[0]["cider"]
    for name in ("alone", "reranker", "memory"):
        enough = [way for way in ways if way["with"] == name and way["cider"] >= report["notebook"]["cider"]]
        assert (name in report) == bool(enough)
        if enough:
            assert report[name]["ratio_on_a_cache"] > report[name]["ratio"] > 0
