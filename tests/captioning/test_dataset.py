"""A data set goes in, a captioned data set comes out: every source, every form, no row lost."""

import json
import tarfile

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blipren.training.cli import main
from blipren.training.commands.caption import CaptionSettings
from blipren.training.data.sources.open_rows import open_rows
from tests.captioning.conftest import COLOURS, QUESTION, caption_in_actor
from tests.data.tools import encoded, run_embed, write_tar
from tests.evaluation.conftest import colour_picture

OPTIONS = ["--device", "cpu", "--workers", "0", "--rows-per-shard", "5", "--batch-size", "3"]


def caption(model, data, out, *more) -> int:
    return main(["caption", str(model), str(data), "--out", str(out), *OPTIONS, *map(str, more)])


def info(out) -> dict:
    found = json.loads((out / "captions.json").read_text())
    counts = found["counts"]
    assert counts["rows"] == counts["captioned"] + counts["rejected"]
    assert len((out / "rejected.jsonl").read_text().splitlines()) == counts["rejected"]
    return found


def rows_of(out) -> list[dict]:
    """All rows as `datasets` reads them, of all splits."""
    loaded = datasets.load_dataset(str(out), cache_dir=str(out.parent / "library"))
    return [row for split in loaded.values() for row in split]


def rows_of_tars(out) -> list[dict]:
    """All rows of a WebDataset. Of columns that the first rows lack, `datasets` cannot infer the types."""
    rows = []
    for path in sorted((out / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            rows += [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    return rows


def content(out) -> dict[str, bytes]:
    """All files of a data set but the one with the library's lock."""
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def names_its_colour(row: dict, number: int) -> bool:
    return list(COLOURS)[number % 6] in row["caption"]


def test_a_folder_with_metadata(seeing, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert caption(seeing, pictures, out) == 0
    printed = capsys.readouterr().out
    assert "22 rows = 20 captioned + 2 rejected" in printed and "rejected, html: 1" in printed
    assert info(out)["counts"]["rejected_by_reason"] == {"html": 1, "truncated": 1}
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "library"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 16, "test": 4}
    for row in rows_of(out):
        number = int(row["file_name"][:2])
        assert names_its_colour(row, number)
        assert row["captions"] == [f"picture {number}"] and row["weight"] == number / 2
        assert row["tags"] == {"colour": number % 6} and row["image"].size == (40, 32)
        assert row["caption_ended"] and row["caption_num_tokens"] > 2 and -1 < row["caption_mean_logprob"] < 0
    assert caption(seeing, pictures, out) == 0
    assert "is complete: nothing to caption" in capsys.readouterr().out
    assert caption(seeing, pictures, out, "--max-new-tokens", "5") == 1
    assert "max_new_tokens = 64, and now it is 5" in capsys.readouterr().err


def write_parquet(folder, with_path: bool = False):
    folder.mkdir()
    for part in range(2):
        numbers = range(7 * part, 7 * part + 7)
        images = [encoded(colour_picture(i), "PNG") if i != 9 else b"\0" * 40 for i in numbers]
        columns = {"jpg": images, "key": [f"k{i}" for i in numbers], "caption": [f"old {i}" for i in numbers]}
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def sources(seeing, pictures, tmp_path_factory):
    """Every kind of source: what is given, rows in it, broken ones."""
    root = tmp_path_factory.mktemp("sources")
    parquet = write_parquet(root / "parquet")
    samples = {f"{i:03d}": {"png": encoded(colour_picture(i), "PNG"), "txt": b"old"} for i in range(6)}
    (root / "tars").mkdir()
    write_tar(root / "tars" / "00000.tar", samples)
    saved = datasets.Dataset.from_dict(
        {"image": [colour_picture(i) for i in range(6)], "label": [i % 2 for i in range(6)]}
    ).cast_column("label", datasets.ClassLabel(names=["even", "odd"]))
    saved.save_to_disk(str(root / "saved"))
    plain = root / "plain"
    (plain / "deep").mkdir(parents=True)
    for i in range(5):
        colour_picture(i).save(plain / "deep" / f"{i}.png")
    (plain / "notes.txt").write_text("no picture")
    for file in parquet.iterdir():
        fsspec.filesystem("memory").pipe(f"/captioned/{file.name}", file.read_bytes())
    run_embed(seeing, pictures, root / "cache", dtype="float32")
    return {
        "parquet": (f"{parquet}/*.parquet", 14, 1),
        "tars": (root / "tars", 6, 0),
        "saved": (root / "saved", 6, 0),
        "plain": (plain, 6, 1),
        "remote": ("memory://captioned/*.parquet", 14, 1),
        "cache": (root / "cache", 18, 0),  # some of the pictures are near duplicates
        "both": (f"{parquet},{root / 'saved'}", 20, 1),
    }


@pytest.mark.parametrize("kind", ["parquet", "tars", "saved", "plain", "remote", "cache", "both"])
def test_every_source(kind, seeing, sources, tmp_path, monkeypatch):
    given, rows, broken = sources[kind]
    out = tmp_path / "out"
    assert caption(seeing, given, out) == 0
    counts = info(out)["counts"]
    if kind == "cache":
        rows = counts["rows"]
        assert rows > 3
    assert (counts["rows"], counts["rejected"]) == (rows, broken)
    found = rows_of(out)
    assert len(found) == rows - broken
    name = "generated_caption" if kind in ("parquet", "remote", "both") else "caption"
    for row in found:
        assert row[name].split()[-1] == "." and row[f"{name}_ended"]
    if kind in ("parquet", "remote"):
        assert {row["caption"] for row in found} == {f"old {i}" for i in range(14) if i != 9}
        assert all(list(COLOURS)[int(row["key"][1:]) % 6] in row[name] for row in found)
    if kind == "saved":
        assert datasets.load_dataset(str(out), cache_dir=str(tmp_path / "l"))["train"].features["label"].names == [
            "even",
            "odd",
        ]
    if kind == "plain":
        assert sorted(row["file_name"] for row in found) == [f"deep/{i}.png" for i in range(5)]
    if kind == "cache":
        assert all(int(row["id"][:2]) % 6 == list(COLOURS).index(colour_in(row["caption"])) for row in found)
    # folders and Parquet have tests of these forms below; a cache has no pictures that metadata.jsonl could name
    forms = {"tars": ("webdataset", "metadata"), "saved": ("webdataset", "metadata"), "cache": ("webdataset",)}
    forms["both"] = forms["saved"]
    for form in forms.get(kind, ()):
        assert caption(seeing, given, tmp_path / form, "--format", form) == 0
        assert info(tmp_path / form)["counts"] == counts
        others = rows_of_tars(tmp_path / form) if form == "webdataset" else rows_of(tmp_path / form)
        assert sorted(row[name] for row in others) == sorted(row[name] for row in found)
    options = {"engine": "ray", "device": "cpu", "workers": 0, "rows_per_shard": 5, "batch_size": 3}
    settings = CaptionSettings(model=str(seeing), images=[str(given)], out=str(tmp_path / "ray"), **options)
    caption_in_actor(settings, tmp_path / "elsewhere", monkeypatch)
    assert content(tmp_path / "ray") == content(out)


def colour_in(text: str) -> str:
    return next(name for name in COLOURS if name in text)


def test_batch_size_and_workers_change_nothing(seeing, pictures, tmp_path):
    texts = []
    for number, more in enumerate((["--batch-size", 1], ["--batch-size", 7, "--workers", 2])):
        assert caption(seeing, pictures, tmp_path / str(number), *more) == 0
        texts.append([(row["file_name"], row["caption"]) for row in rows_of(tmp_path / str(number))])
    assert texts[0] == texts[1] and len(texts[0]) == 20


def test_a_webdataset_is_written(seeing, pictures, tmp_path):
    out = tmp_path / "out"
    assert caption(seeing, pictures, out, "--format", "webdataset") == 0
    with tarfile.open(out / "data" / "train-00000.tar") as tar:
        assert tar.getnames()[:3] == ["000000000.png", "000000000.txt", "000000000.json"]
        assert "red" in tar.extractfile("000000000.txt").read().decode()
    found = rows_of(out)
    assert len(found) == 20 and all(row["txt"] == row["json"]["caption"] for row in found)
    source = open_rows(str(out / "data"), caption_columns=["txt"])
    assert sum(1 for row in source if row.load().size == (40, 32)) == 20


def test_metadata_beside_the_pictures(seeing, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    for i in range(4):
        colour_picture(i).save(folder / "a" / f"{i}.png")
    assert caption(seeing, folder, folder, "--format", "metadata") == 0
    rows = list(open_rows(str(folder)))
    assert [row.record is None and row.answers for row in rows] == [row.answers for row in rows]
    assert [colour_in(row.answers[0]) for row in rows] == list(COLOURS)[:4]
    assert all(row.load().size == (40, 32) for row in rows)
    other = tmp_path / "other"
    assert caption(seeing, write_parquet(tmp_path / "parquet"), other, "--format", "metadata") == 0
    assert len(rows_of(other)) == 13 and len(list((other / "images").iterdir())) == 13
    (tmp_path / "parquet" / "metadata.jsonl").write_text('{"file_name": "x.png"}\n')
    assert caption(seeing, tmp_path / "parquet", tmp_path / "parquet", "--format", "metadata") == 1
    assert "a metadata.jsonl that is not ours" in capsys.readouterr().err


def test_several_prompts_have_a_column_each(seeing, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    prompts = ["--prompts", "Short caption:", f"colour={QUESTION}", "--limit", "6"]
    assert caption(seeing, pictures, out, *prompts) == 0
    for number, row in enumerate(sorted(rows_of(out), key=lambda row: row["file_name"])):
        assert row["colour"] == list(COLOURS)[number] and row["colour"] in row["caption_0"]
        assert row["colour_num_tokens"] < row["caption_0_num_tokens"]
    assert info(out)["columns"][0] == "caption_0"
    assert caption(seeing, pictures, tmp_path / "x", "--prompts", "a=What?", "a=Who?") == 1
    assert "two prompts would have the same column" in capsys.readouterr().err


def test_matching_scores_choose_candidates_and_filter(seeing, aligned, pictures, tmp_path, capsys):
    out = tmp_path / "scored"
    assert caption(seeing, pictures, out, "--matching-model", aligned) == 0
    assert all(0 <= row["caption_matching_score"] <= 1 for row in rows_of(out))
    sampled = ["--matching-model", aligned, "--temperature", "2.5", "--limit", "12", "--max-new-tokens", "8"]
    many, best = tmp_path / "many", tmp_path / "best"
    assert caption(seeing, pictures, many, *sampled, "--candidates", "4", "--keep", "4") == 0
    assert caption(seeing, pictures, best, *sampled, "--candidates", "4") == 0
    kept = {row["file_name"]: row for row in rows_of(many)}
    assert any(len(set(row["caption"])) > 2 for row in kept.values())
    for row in rows_of(best):
        every = kept[row["file_name"]]
        scores = every["caption_matching_score"]
        assert scores == sorted(scores, reverse=True) and len(scores) == 4
        assert row["caption"] == every["caption"][0] and row["caption_matching_score"] == max(scores)
    refused = tmp_path / "refused"
    strict = "{min_matching_score: 0.5, max_tokens: 6, ended: true}"
    assert caption(seeing, pictures, refused, *sampled, "--filter", strict) == 0
    reasons = info(refused)["counts"]["rejected_by_reason"]
    assert set(reasons) > {"html", "truncated"} - {"html"} and set(reasons) & {
        "min_matching_score",
        "max_tokens",
        "ended",
    }
    assert all(row["caption_matching_score"] >= 0.5 and row["caption_num_tokens"] <= 6 for row in rows_of(refused))
    capsys.readouterr()
    assert caption(seeing, pictures, tmp_path / "x", "--temperature", "1", "--candidates", "2") == 1
    assert "has no trained matching head" in capsys.readouterr().err
    assert caption(seeing, pictures, tmp_path / "x", "--matching-model", seeing) == 1
    assert "name a checkpoint of `blipren align`" in capsys.readouterr().err


@pytest.mark.parametrize("engine", [["--engine", "vllm"], ["--engine", "ray", "--actor-engine", "vllm"]])
def test_vllm_refuses_what_it_cannot_do_before_it_starts(engine, seeing, pictures, tmp_path, capsys):
    for options, message in (
        (["--num-beams", "2"], "vLLM has no num_beams, or reads it otherwise"),
        (["--filter", "{min_matching_score: 0.5}"], "vLLM computes no matching scores"),
    ):
        assert caption(seeing, pictures, tmp_path / "x", *engine, *options) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--candidates", "3"], "candidates are sampled: give a temperature above 0"),
        (["--temperature", "1", "--candidates", "2", "--keep", "3"], "keep is 3, and there are 2 candidates"),
        (["--filter", "{min_beauty: 1}"], "unknown rule 'min_beauty' in filter"),
        (["--filter", "{min_tokens: many}"], "min_tokens in filter is 'many'; it must be a number"),
        (["--prompt", "a", "--prompts", "b", "c"], "give prompt or prompts, not both"),
        (["--engine", "ray"], "engine ray writes a data set: give --out"),
        (["--actor-engine", "vllm", "--out", "o"], "actor_engine vllm computes in Ray's actors: give --engine ray"),
        (["--out", "o", "--csv", "c.csv"], "leave them out with --out"),
    ],
)
def test_wrong_use_is_one_line(options, message, capsys):
    assert main(["caption", "model", "photos", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
