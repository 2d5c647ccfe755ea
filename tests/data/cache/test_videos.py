"""Videos in a feature cache: from folders, Parquet and tars; faults counted; what training and evaluation make of them."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.commands.evaluate import run as evaluate
from blipren.training.commands.train import TrainSettings
from blipren.training.commands.train import run as train
from blipren.training.data.batches.training_data import open_caches, open_online
from blipren.training.errors import UserError
from blipren.video_blipren import read_frames
from tests.data.tools import make_model, run_embed, write_folder, write_tar


def moving(seed: int, frames: int = 6) -> bytes:
    """An animated GIF of a square that moves."""
    rng = np.random.default_rng(seed)
    ground, ink = (tuple(int(v) for v in rng.integers(0, 256, 3)) for _ in range(2))
    pictures = []
    for number in range(frames):
        picture = Image.new("RGB", (40, 40), ground)
        picture.paste(ink, (4 * number, 10, 4 * number + 16, 26))
        pictures.append(picture)
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    return file.getvalue()


@pytest.fixture(scope="module")
def video_model(tmp_path_factory, tiny_vision, tiny_llm):
    """A checkpoint that takes four frames: 64 patches x 32."""
    return make_model(tmp_path_factory.mktemp("video") / "model", tiny_vision, tiny_llm, frames=4)


@pytest.fixture
def clips(tmp_path):
    """Ten clips with captions and questions: six train, two validation, two test."""
    splits = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    rows = [
        {
            "file_name": f"clips/{i:02d}.gif",
            "captions": [f"clip {i} moves"],
            "questions": ["Which way ?"],
            "answers": [f"way {i}"],
            "split": s,
        }
        for i, s in enumerate(splits)
    ]
    return write_folder(tmp_path / "clips", rows, {row["file_name"]: moving(i) for i, row in enumerate(rows)})


def test_features_of_a_folder_of_clips(video_model, clips, tmp_path, capsys):
    cache = run_embed(video_model, clips, tmp_path / "cache", dtype="float32")
    assert "64 patches x 32 x float32 = 8,192 bytes a video" in capsys.readouterr().out
    assert cache.num_patches == 64 and cache.counts["cached"] == 10 and cache.counts["rejected"] == 0
    model, processor = (c.from_pretrained(video_model) for c in (BliprenForConditionalGeneration, BliprenProcessor))
    (data,), _ = open_caches([(cache, 1.0)], model, processor)
    assert data.visual_tokens(0) == processor.num_video_tokens == 4
    with torch.no_grad():
        own = model.encode_videos(**processor.video_processor([clips / "clips/03.gif"], return_tensors="pt"))
    torch.testing.assert_close(data.inputs([3], None)["patch_features"], own, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="online training takes images"):
        open_online(str(clips), model, processor, TrainSettings(model="m", cache="c", out="o"), augment=False)


def test_times_in_seconds_are_cached_with_the_features(video_model, clips, tmp_path, tiny_vision, tiny_llm):
    folder = make_model(tmp_path / "model", tiny_vision, tiny_llm, frames=4, time_embedding="seconds")
    cache = run_embed(folder, clips, tmp_path / "cache", dtype="float32")
    model, processor = (c.from_pretrained(folder) for c in (BliprenForConditionalGeneration, BliprenProcessor))
    (data,), _ = open_caches([(cache, 1.0)], model, processor)
    with torch.no_grad():
        own = model.encode_videos(**processor.video_processor([clips / "clips/03.gif"], return_tensors="pt"))
    torch.testing.assert_close(data.inputs([3], None)["patch_features"], own, atol=1e-5, rtol=0)
    assert own[0, ::16, -1].tolist() == pytest.approx([0.075, 0.225, 0.375, 0.525])  # of 0.6 seconds
    with pytest.raises(UserError, match="frame_times"):
        by_place = BliprenForConditionalGeneration.from_pretrained(video_model)
        open_caches([(cache, 1.0)], by_place, processor)
    with pytest.raises(UserError, match="int8 cannot hold the times of frames in seconds"):
        run_embed(folder, clips, tmp_path / "small", dtype="int8")


def test_training_and_evaluation_on_clips(video_model, clips, tmp_path, tiny_vision, tiny_llm):
    video_model = make_model(tmp_path / "model", tiny_vision, tiny_llm, frames=4, time_embedding="seconds")
    run_embed(video_model, clips, tmp_path / "cache")
    settings = {"max_steps": 2, "batch_size": 4, "device": "cpu", "workers": 0, "generate_samples": 1, "warmup": 0.0}
    assert not train(
        TrainSettings(model=str(video_model), cache=str(tmp_path / "cache"), out=str(tmp_path / "run"), **settings)
    )
    out = tmp_path / "report"
    options = {"tasks": ["captioning", "vqa"], "tokenizer": "python", "meteor": False, "resamples": 20}
    evaluate(
        EvaluateSettings(model=str(tmp_path / "run"), dataset=str(clips), out=str(out), max_new_tokens=4, **options)
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["counts"]["images"] == 2
    assert (out / "report.html").is_file()


def test_faulty_clips_are_counted(video_model, tmp_path):
    files = {
        "a.gif": moving(1),
        "b.gif": b"",
        "c.gif": moving(2)[:60],
        "d.gif": moving(3, frames=1),
        "e.mp4": b"\0" * 99,
    }
    rows = [{"file_name": name, "caption": "it moves", "split": "train"} for name in [*files, "f.gif", "../a.gif"]]
    pytest.importorskip("av")
    cache = run_embed(video_model, write_folder(tmp_path / "data", rows, files), tmp_path / "cache")
    lines = [json.loads(line) for line in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == {
        "b.gif": "empty",
        "c.gif": "unreadable",
        "e.mp4": "unreadable",
        "f.gif": "missing_file",
        "../a.gif": "outside_folder",
    }
    assert cache.counts["rows"] == 7 == cache.counts["cached"] + cache.counts["rejected"]


def test_parquet_and_tars_of_clips(video_model, tmp_path):
    rows = {
        "video": [{"bytes": moving(i), "path": None} for i in range(3)],
        "caption": [f"clip {i}" for i in range(3)],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "clips.parquet")
    write_tar(tmp_path / "clips.tar", {f"{i:03d}": {"mp4": moving(i), "txt": f"clip {i}".encode()} for i in range(3)})
    options = {"dtype": "float32", "validation_share": 0.0, "test_share": 0.0}
    caches = [run_embed(video_model, tmp_path / f"clips.{k}", tmp_path / k, **options) for k in ("parquet", "tar")]
    first, second = (cache.patch_features("train", [0, 1, 2])[0] for cache in caches)
    assert torch.equal(first, second) and first.shape == (3, 64, 32)


def test_the_same_things_in_another_order_are_no_near_duplicates(video_model, tmp_path):
    frames = read_frames(moving(1), 6)
    files = {}
    for name, order in (("there.gif", frames), ("back.gif", frames[::-1]), ("again.gif", frames)):
        file = io.BytesIO()
        order[0].save(file, "GIF", save_all=True, append_images=order[1:], duration=90 if "again" in name else 100)
        files[name] = file.getvalue()
    rows = [
        {"file_name": name, "caption": "it moves", "split": "test" if name == "there.gif" else "train"}
        for name in files
    ]
    cache = run_embed(video_model, write_folder(tmp_path / "data", rows, files), tmp_path / "cache")
    assert cache.ids("train") == ["back.gif"]


def test_an_image_model_refuses_videos(tiny_model, clips, tmp_path):
    with pytest.raises(UserError, match="holds videos .* takes images: make a model with `blipren new --frames 8`"):
        run_embed(tiny_model, clips, tmp_path / "cache")
