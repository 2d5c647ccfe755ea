"""Rows from every shape of data set that `embed` and `evaluate` read."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from blipren.training.arguments import split_weights
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.errors import UserError
from tests.data.tools import encoded, picture, write_folder, write_tar


def write_parquet(path, columns: dict) -> str:
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def test_folder_with_metadata(photo_folder):
    source = open_rows(str(photo_folder))
    rows = list(source)
    assert source.num_rows == 12 and len(rows) == 12
    assert [row.split for row in rows] == ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
    assert rows[3].id == "images/03.jpg"
    assert rows[3].prompts == [None, None]
    assert rows[3].answers == ["picture number 3 in colours", "smooth colours, the 3th"]
    assert rows[3].load().size == (48, 40) and (rows[3].width, rows[3].height) == (48, 40)
    assert [row.id for row in source.rows(5)] == [row.id for row in rows[5:]]
    assert [row.index for row in source.rows(5)] == list(range(5, 12))
    assert [row.id for row in open_rows(str(photo_folder), split="test")] == ["images/10.jpg", "images/11.jpg"]


def test_folder_with_one_metadata_file_a_split_and_repeated_names(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        rows = [{"file_name": f"{i}.png", "caption": f"{split} {i} {k}"} for i in range(count) for k in range(2)]
        write_folder(tmp_path / split, rows, {f"{i}.png": encoded(picture(i), "PNG") for i in range(count)})
    source = open_rows(str(tmp_path))
    rows = list(source)
    assert [(row.id, row.split) for row in rows] == [
        ("train/0.png", "train"), ("train/1.png", "train"), ("train/2.png", "train"), ("val/0.png", "validation"),
    ]  # fmt: skip
    assert rows[1].answers == ["train 1 0", "train 1 1"] and source.merged_rows == 4


def test_csv_metadata_and_caption_columns(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(0), "PNG"))
    (tmp_path / "metadata.csv").write_text('file_name,caption_0,caption_1,other\na.png,"one, two",three,x\n')
    assert next(iter(open_rows(str(tmp_path)))).answers == ["one, two", "three"]
    assert next(iter(open_rows(str(tmp_path), caption_columns=["caption_1", "other"]))).answers == ["three", "x"]
    with pytest.raises(UserError, match=r"no column 'nothing' .*caption_0, caption_1, file_name, other"):
        open_rows(str(tmp_path), caption_columns=["nothing"])


def test_preference_between_caption_columns(tmp_path):
    rows = [
        {"file_name": "a.png", "caption": "long one", "short_caption": "short"},
        {"file_name": "b.png", "caption": "long two", "short_caption": ""},
        {"file_name": "c.png", "caption": "long three", "short_caption": None},
    ]
    write_folder(tmp_path, rows, {row["file_name"]: encoded(picture(i), "PNG") for i, row in enumerate(rows)})
    assert [row.answers for row in open_rows(str(tmp_path))] == [["short"], ["long two"], ["long three"]]
    reverse = open_rows(str(tmp_path), caption_columns=["caption/short_caption"])
    assert [row.answers for row in reverse] == [["long one"], ["long two"], ["long three"]]


def test_questions_beside_conversations(tmp_path):
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a cat"}]
    columns = {
        "image": [encoded(picture(i)) for i in range(3)],
        "question": [["what colour?", "how many?"], ["which shape?", "is it red?"], ["x?", "y?"]],
        "answer": [["red", "3"], ["circle", "no"], ["only one"]],
        "conversations": [json.dumps(turns)] * 3,
    }
    rows = list(open_rows(write_parquet(tmp_path / "vqa.parquet", columns)))
    assert rows[0].prompts == ["what colour?", "how many?"] and rows[0].answers == ["red", "3"]
    assert rows[0].conversation.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    assert rows[2].prompts == [] and rows[2].problems == [("question_count", "2 questions, 1 answers")]


def test_one_question_with_many_answers(tmp_path):
    answers = [[{"answer": "red", "answer_id": 1}, {"answer": "dark red", "answer_id": 2}]]
    path = write_parquet(
        tmp_path / "v.parquet", {"image": [encoded(picture(0))], "question": ["colour?"], "answers": answers}
    )
    row = next(iter(open_rows(path)))
    assert row.prompts == ["colour?", "colour?"] and row.answers == ["red", "dark red"]
    both = open_rows(path, question_column="question", answer_column="answers")
    assert next(iter(both)).answers == row.answers


def test_own_form_with_prompts_and_answers(tmp_path):
    rows = [{"file_name": "a.png", "prompts": [None, "How many?"], "answers": ["two dogs", "two"], "split": "dev"}]
    write_folder(tmp_path, rows, {"a.png": encoded(picture(0), "PNG")})
    row = next(iter(open_rows(str(tmp_path))))
    assert row.prompts == [None, "How many?"] and row.answers == ["two dogs", "two"] and row.split == "validation"


def test_parquet_folder_with_its_own_splits(tmp_path):
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        columns = {
            "image": [{"bytes": encoded(picture(i)), "path": None} for i in range(count)],
            "caption": [f"{split} {i}" for i in range(count)],
        }
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", columns)
    rows = list(open_rows(str(tmp_path)))
    assert [row.split for row in rows] == ["train"] * 3 + ["validation"] * 2 + ["test"]
    assert len({row.id for row in rows}) == 6 and rows[0].load().size == (48, 40)


def test_img2dataset_parquet_with_status(tmp_path):
    columns = {
        "jpg": [encoded(picture(0)), None, encoded(picture(2))],
        "caption": ["a", "b", "c"],
        "key": ["000000000", "000000001", "000000002"],
        "status": ["success", "failed_to_download", "success"],
        "error_message": [None, "HTTP Error 404", None],
    }
    write_parquet(tmp_path / "00000.parquet", columns)
    (tmp_path / "00000_stats.json").write_text("{}")
    rows = list(open_rows(str(tmp_path)))
    assert [row.id for row in rows] == columns["key"]
    assert [row.rejected for row in rows] == [None, ("status", "failed_to_download: HTTP Error 404"), None]


def test_img2dataset_webdataset_tars(tmp_path):
    for shard in range(2):
        samples = {}
        for i in range(3):
            key, ok = f"{shard:05d}{i:04d}", (shard, i) != (1, 2)
            meta = {
                "caption": f"shard {shard} image {i}",
                "status": "success" if ok else "failed_to_resize",
                "key": key,
            }
            samples[key] = {
                "jpg": encoded(picture(3 * shard + i)),
                "txt": meta["caption"].encode(),
                "json": json.dumps(meta).encode(),
            }
        write_tar(tmp_path / f"{shard:05d}.tar", samples)
        write_parquet(tmp_path / f"{shard:05d}.parquet", {"caption": ["log"], "status": ["success"]})
    source = open_rows(str(tmp_path))
    rows = list(source)
    assert [row.answers for row in rows] == [[f"shard {s} image {i}"] for s in range(2) for i in range(3)]
    assert [row.rejected is None for row in rows] == [True] * 5 + [False]
    assert rows[4].id == "00001/000010001" and rows[4].load().size == (48, 40)
    assert [row.id for row in source.rows(4)] == [row.id for row in rows[4:]]
    nested = open_rows(str(tmp_path / "*.tar"), caption_columns=["json.caption"])
    assert next(iter(nested)).answers == ["shard 0 image 0"]


def test_saved_dataset_with_class_labels(tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "split": datasets.ClassLabel(names=["train", "test"]),
        }
    )
    data = datasets.Dataset.from_dict(
        {"image": [picture(i) for i in range(3)], "caption": ["a", "b", "c"], "split": [0, 1, 0]}, features=features
    )
    data.save_to_disk(str(tmp_path / "saved"))
    rows = list(open_rows(str(tmp_path / "saved")))
    assert [row.split for row in rows] == ["train", "test", "train"]
    assert isinstance(rows[1].load(), Image.Image)


def test_mixture_with_and_without_weights(tmp_path, photo_folder):
    other = [{"file_name": f"{i}.png", "captions": [f"other {i}"]} for i in range(30)]
    write_folder(tmp_path / "other", other, {f"{i}.png": encoded(picture(100 + i), "PNG") for i in range(30)})
    plain = list(open_rows(f"{photo_folder},{tmp_path / 'other'}"))
    assert len(plain) == 42 and len({row.id for row in plain}) == 42 and plain[-1].split is None
    weighted = open_rows(f"{photo_folder}=1,{tmp_path / 'other'}=2")
    ids = [row.id for row in weighted]
    assert len(set(ids)) == len(ids)
    first = sum(row_id.startswith("0/") for row_id in ids)
    assert 0.15 < first / len(ids) < 0.55 and ids == [row.id for row in weighted]
    assert [row.id for row in weighted.rows(7)] == ids[7:]
    with pytest.raises(UserError, match="'lots' is no number"):
        split_weights(f"{photo_folder}=lots,x=1")


def test_hash_decides_where_nothing_else_does(tmp_path):
    rows = [{"file_name": f"{i}.png", "caption": f"c {i}"} for i in range(40)]
    write_folder(tmp_path / "a", rows, {f"{i}.png": encoded(picture(i), "PNG") for i in range(40)})
    write_folder(tmp_path / "b", rows[::-1], {f"{i}.png": encoded(picture(i), "PNG") for i in range(40)})
    shares = {"validation_share": 0.2, "test_share": 0.2}
    found = [{row.id for row in open_rows(str(tmp_path / name), split="test", **shares)} for name in "ab"]
    assert found[0] == found[1] and 2 <= len(found[0]) <= 16


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "empty"])
def test_nothing_there_is_one_clear_line(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        open_rows(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_image_column_lists_what_there_is(tmp_path):
    write_folder(tmp_path, [{"caption": "x", "photo": "a.png"}], {})
    with pytest.raises(UserError, match="no image column found; name it by --image-column.*caption, photo"):
        open_rows(str(tmp_path))


def test_readers_start_at_any_row_without_the_files_before(tmp_path, monkeypatch):
    """Parquet and tars: earlier files are counted by footer or header and never opened as data."""
    for shard, count in enumerate((3, 1, 4)):
        columns = {
            "image": [encoded(picture(10 * shard + i)) for i in range(count)],
            "caption": [f"s {shard} {i}" for i in range(count)],
        }
        write_parquet(tmp_path / f"part-{shard}.parquet", columns)
        samples = {
            f"{shard}{i:03d}": {"jpg": data, "txt": text.encode()}
            for i, (data, text) in enumerate(zip(*columns.values()))
        }
        write_tar(tmp_path / f"part-{shard}.tar", samples)
    for pattern in ("*.parquet", "*.tar"):
        source = open_rows(str(tmp_path / pattern))
        rows = list(source)
        assert source.count_rows() == len(rows) == 8
        for start in range(9):
            part = list(open_rows(str(tmp_path / pattern)).rows(start))
            assert [(row.id, row.index, row.answers) for row in part] == [
                (r.id, r.index, r.answers) for r in rows[start:]
            ]
            assert all(row.load().size == (48, 40) for row in part)
    url = open_rows(f"file://{tmp_path}/*.parquet")
    assert [row.answers for row in url.rows(5)] == [["s 2 1"], ["s 2 2"], ["s 2 3"]] and url.num_rows == 8
