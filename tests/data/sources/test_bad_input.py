"""Everything that can be wrong with an image or a caption, with real bytes: converted rightly, or rejected and counted."""

import io
import json
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from blipren.training.data.sources.images import Folder, ImageError, decode_image, image_bytes
from blipren.training.data.sources.open_rows import open_rows
from blipren.training.engine.loading import load_checkpoint
from tests.data.tools import encoded, picture, run_embed, write_folder

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def plain(color, mode="RGB", size=(8, 8)) -> Image.Image:
    return Image.new(mode, size, color)


def center(data: bytes) -> tuple[int, int, int]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel((image.width // 2, image.height // 2))


def close(found, expected, tolerance=6) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(found, expected, strict=True))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def rotated_jpeg(orientation: int) -> bytes:
    """A 20x10 picture, left half red, right half blue, that its EXIF tag turns."""
    image = plain(RED, size=(20, 10))
    image.paste(BLUE, (10, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif, quality=95, subsampling=0)


def animated_gif() -> bytes:
    stream = io.BytesIO()
    plain(RED).save(stream, "GIF", save_all=True, append_images=[plain(BLUE)], duration=100)
    return stream.getvalue()


def palette_with_transparency() -> bytes:
    image = plain(0, "P")
    image.putpalette([0, 0, 0, *RED] + [0] * 750)
    image.paste(1, (0, 0, 4, 8))
    return encoded(image, "PNG", transparency=0)


def half_clear() -> bytes:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (4, 0, 8, 8))  # hidden green: convert("RGB") would show it
    image.paste((0, 0, 255, 128), (0, 4, 4, 8))
    return encoded(image, "PNG")


def ramp16(fmt: str) -> bytes:
    values = np.tile(np.array([0, 255, 256, 32768, 65535, 0, 0, 0], dtype=np.uint16), (8, 1))
    return encoded(Image.fromarray(values), fmt)


@pytest.mark.parametrize(
    "data, expected",
    [
        (encoded(plain((0, 255, 255, 0), "CMYK"), "JPEG", quality=95), RED),
        (encoded(plain((0, 255, 255, 0), "CMYK"), "TIFF"), RED),
        (encoded(plain(1, "1"), "PNG"), WHITE),
        (encoded(plain(77, "L"), "PNG"), (77, 77, 77)),
        (encoded(plain((100, 255), "LA"), "PNG"), (100, 100, 100)),
        (encoded(plain((100, 0), "LA"), "PNG"), WHITE),
        (encoded(plain((0, 0, 0, 0), "RGBA"), "WEBP", lossless=True), WHITE),
        (encoded(plain(RED).quantize(4), "PNG"), RED),
        (animated_gif(), RED),
        (encoded(plain(RED), "BMP"), RED),
        (encoded(plain(RED), "PPM"), RED),
        (encoded(plain(0.5, "F"), "TIFF"), (128, 128, 128)),
        (encoded(plain(200.0, "F"), "TIFF"), (200, 200, 200)),
        (encoded(plain(RED, size=(1, 1)), "PNG"), RED),
    ],
    ids=["cmyk-jpeg", "cmyk-tiff", "1-bit", "grey", "LA", "LA-clear", "webp-clear", "palette", "gif", "bmp", "ppm",
         "float-unit", "float-255", "1x1"],
)  # fmt: skip
def test_every_mode_is_shown_as_a_viewer_would(data, expected):
    assert close(center(data), expected)


def test_transparency_lies_on_white():
    image = decode_image(half_clear())
    assert image.getpixel((1, 1)) == RED and image.getpixel((6, 4)) == WHITE
    assert close(image.getpixel((1, 6)), (127, 127, 255))
    image = decode_image(palette_with_transparency())
    assert image.getpixel((1, 1)) == RED and image.getpixel((6, 1)) == WHITE


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_greys_keep_their_range(fmt):
    row = [decode_image(ramp16(fmt)).getpixel((x, 4))[0] for x in range(5)]
    assert row == [0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    "orientation, size, top_left, bottom_right",
    [(1, (20, 10), RED, BLUE), (3, (20, 10), BLUE, RED), (6, (10, 20), RED, BLUE), (8, (10, 20), BLUE, RED)],
)
def test_exif_rotation_is_done(orientation, size, top_left, bottom_right):
    image = decode_image(rotated_jpeg(orientation))
    assert image.size == size
    assert close(image.getpixel((0, 0)), top_left, 40)
    assert close(image.getpixel((size[0] - 1, size[1] - 1)), bottom_right, 40)


PHOTO = encoded(picture(1), "JPEG")
BROKEN = {
    "truncated.jpg": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "truncated.png": (encoded(picture(1), "PNG")[:-600], "truncated"),
    "empty.jpg": (b"", "empty"),
    "zeros.jpg": (b"\0" * 512, "empty"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "html"),
    "drawing.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>', "svg"),
    "drawing.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "svg"),
    "noise.jpg": (bytes(range(256)) * 4, "unreadable"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "unreadable"),
    "bomb.png": (png_header(20_000, 20_000), "too_large"),
    "large.png": (png_header(12_000, 9_000), "too_large"),  # 108 megapixels: where PIL only warns
    "narrow.png": (encoded(plain(RED, size=(30_000, 1)), "PNG"), "aspect_ratio"),
    "nan.tiff": (encoded(plain(float("nan"), "F"), "TIFF"), "not_finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_have_their_reason(name):
    data, reason = BROKEN[name]
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason and caught.value.detail


PATHS = {
    "../outside.png": "outside_folder",
    "images/../../outside.png": "outside_folder",
    "/etc/hostname": "outside_folder",
    "C:\\secret.png": "outside_folder",
    "file:///etc/hostname": "remote_path",
    "http://127.0.0.1:9/cat.png": "remote_path",
    "s3://bucket/cat.png": "remote_path",
    "zip://a.png::http://127.0.0.1:9/a.zip": "remote_path",
    "missing.png": "missing_file",
    "a\0b.png": "missing_file",
    "": "missing_file",
}


@pytest.mark.parametrize("path", PATHS)
def test_paths_stay_inside_the_folder(tmp_path, path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(encoded(plain(RED), "PNG"))
    for cell in (path, {"path": path, "bytes": None}):
        with pytest.raises(ImageError) as caught:
            image_bytes(cell, Folder(root=str(tmp_path / "data")))
        assert caught.value.reason == PATHS[path]
    with pytest.raises(ImageError):
        image_bytes("a.png", Folder())


def test_a_whole_folder_of_it(tmp_path, tiny_model, capsys):
    """Law 12: rows in = cached + rejected, each with its reason; what is cached is what a viewer would see."""
    files = {name: data for name, (data, _) in BROKEN.items()}
    rows = [{"file_name": name, "caption": f"this is {name.split('.')[0]}"} for name in files]
    good = {"rotated.jpg": rotated_jpeg(6), "cmyk.jpg": encoded(picture(2).convert("CMYK"), "JPEG"), "gif.gif": animated_gif(),
            "clear.png": half_clear(), "deep.png": ramp16("PNG"), "one.png": encoded(plain(BLUE, size=(1, 1)), "PNG"),
            "strip.png": encoded(picture(3, (300, 2)), "PNG")}  # fmt: skip
    rows += [{"file_name": name, "caption": f"the good {name.split('.')[0]}"} for name in good]
    rows += [{"file_name": path, "caption": "a cat"} for path in PATHS if "\0" not in path]
    rows += [{"file_name": None, "caption": "a cat"}, {"caption": "no image at all"}]
    captions = {
        "none.png": None, "blank.png": "  ", "list.png": [], "number.png": 7, "long.png": "word " * 210_000,
        "nested.png": {"en": 3}, "html.png": "<p>buy</p> it", "url.png": "see http://example.org/a", "same.png": "w w w w w w",
    }  # fmt: skip
    rows += [{"file_name": name, "caption": caption} for name, caption in captions.items()]
    special = {"image.png": "a <image> here", "eos.png": "over</s> and out"}
    rows += [{"file_name": name, "caption": caption} for name, caption in special.items()]
    rows.append({"file_name": "odd.png", "caption": "a good caption", "split": "somewhere"})
    pictures = {name: encoded(picture(20 + i), "PNG") for i, name in enumerate([*captions, *special, "odd.png"])}
    folder = write_folder(tmp_path / "d", rows, files | good | pictures)
    (tmp_path / "outside.png").write_bytes(encoded(plain(RED), "PNG"))
    with open(folder / "metadata.jsonl", "a") as metadata:
        metadata.write('{"file_name": "one.png", "caption": \n')
    cache = run_embed(tiny_model, folder, tmp_path / "c", validation_share=0.0, test_share=0.0, workers=1)

    lines = [json.loads(line) for line in (tmp_path / "c" / "rejected.jsonl").open()]
    reasons = {line["id"]: line["reason"] for line in lines if line["kind"] == "row"}
    assert cache.counts["rows"] == len(rows) + 1 == cache.counts["cached"] + cache.counts["rejected"]
    assert cache.counts["rejected"] == sum(line["kind"] == "row" for line in lines)
    assert set(cache.split("train")["id"]) == set(good) | set(special)
    assert {name: reasons[name] for name in BROKEN} == {name: reason for name, (_, reason) in BROKEN.items()}
    assert {path: reasons[path] for path in PATHS if path and "\0" not in path} == {
        path: reason for path, reason in PATHS.items() if path and "\0" not in path
    }
    assert {reasons[name] for name in captions} == {"no_caption"} and reasons["odd.png"] == "unknown_split"
    rules = {line["id"]: line["reason"] for line in lines if line["kind"] == "text"}
    assert rules == {
        "none.png": "no_text", "blank.png": "empty", "number.png": "no_text", "long.png": "max_chars",
        "nested.png": "no_text", "html.png": "markup", "url.png": "markup", "same.png": "max_repetition",
    }  # fmt: skip
    assert all(len(json.dumps(line)) < 2000 for line in lines)
    assert "metadata_line" in capsys.readouterr().out
    by_id = {row["id"]: row for row in cache.split("train")}
    assert (by_id["rotated.jpg"]["width"], by_id["rotated.jpg"]["height"]) == (10, 20)
    assert by_id["eos.png"]["answers"] == ["over</s> and out"]

    model, processor = load_checkpoint(str(tiny_model))
    place = list(cache.split("train")["id"]).index("clear.png")
    expected = model.encode_images(
        processor.image_processor(images=[decode_image(half_clear())], return_tensors="pt")["pixel_values"]
    )
    assert np.allclose(cache.patch_features("train", [place])[0], expected, atol=2e-3)


def test_paths_inside_parquet_are_refused_too(tmp_path, tiny_model):
    (tmp_path / "d" / "inside").mkdir(parents=True)
    (tmp_path / "d" / "inside" / "a.png").write_bytes(encoded(picture(0), "PNG"))
    (tmp_path / "outside.png").write_bytes(encoded(picture(1), "PNG"))
    paths = ["inside/a.png", "../outside.png", str(tmp_path / "outside.png"), "file:///etc/hostname",
             "http://127.0.0.1:9/x.png", "inside/none.png"]  # fmt: skip
    cells = [{"bytes": None, "path": path} for path in paths] + [
        {"bytes": PHOTO, "path": "http://127.0.0.1:9/x.png"}, {"bytes": PHOTO[:300], "path": None}, None,
    ]  # fmt: skip
    table = pa.table(
        {
            "image": cells,
            "caption": [f"number {i}" for i in range(len(cells))],
            "id": list(map(str, range(len(cells)))),
        }
    )
    features = {
        "info": {
            "features": {
                "image": {"_type": "Image"},
                "caption": {"dtype": "string", "_type": "Value"},
                "id": {"dtype": "string", "_type": "Value"},
            }
        }
    }
    for name, metadata in (("typed", {"huggingface": json.dumps(features)}), ("plain", None)):
        folder = tmp_path / "d" if name == "typed" else tmp_path / "e"
        folder.mkdir(exist_ok=True)
        if name == "plain":
            (tmp_path / "d" / "inside").rename(folder / "inside")
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), folder / "train.parquet")
        cache = run_embed(tiny_model, folder, tmp_path / f"cache-{name}", validation_share=0.0, test_share=0.0)
        assert list(cache.split("train")["id"]) == ["0", "6"]
        lines = [json.loads(line) for line in (cache.folder / "rejected.jsonl").open()]
        assert [line["reason"] for line in lines] == [
            "outside_folder", "outside_folder", "remote_path", "remote_path", "missing_file", "truncated", "no_image",
        ]  # fmt: skip
        assert cache.counts["rows"] == len(cells) == cache.counts["cached"] + cache.counts["rejected"]


def test_rows_are_never_opened_before_they_are_asked_for(tmp_path):
    write_folder(tmp_path, [{"file_name": "none.png", "caption": "x y"}], {})
    row = next(iter(open_rows(str(tmp_path))))
    with pytest.raises(ImageError, match="missing_file: none.png"):
        row.load()
