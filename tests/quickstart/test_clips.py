"""Clips and small digits: what is drawn is what the texts say."""

import numpy as np
from PIL import Image

from blipren import BliprenConfig
from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.quickstart.clips import DIRECTIONS, draw_clip, make_clip, write_clip_texts, write_clips
from blipren.training.quickstart.glyphs import (
    FONT,
    PICTURE_SIDE,
    Glyph,
    draw_digit_picture,
    draw_glyphs,
    make_digit_picture,
    write_digit_texts,
)
from blipren.training.quickstart.scenes import HELD_OUT_COMBINATIONS
from blipren.training.quickstart.worlds import clips, glyphs
from blipren.video_blipren import read_frames


def run_small(world, name: str, out, monkeypatch) -> dict:
    """Run a world with few rows and steps. Returns its summary."""
    real = world.run_step

    def run_step(command, recipe, **values):
        small = {"max_steps": 2, "batch_size": 4, "eval_every": 2} if command == "train" else {}
        small |= {"workers": 0} if command == "embed" else {}
        real(command, recipe, **values | small)

    monkeypatch.setattr(world, "run_step", run_step)
    monkeypatch.setattr(world, "SPLITS", {"train": 12, "validation": 3, "test": 6})
    return world.run_world(QuickstartSettings(out=str(out), world=name), out)


def test_the_world_of_clips_runs_at_small_size(tmp_path, monkeypatch):
    summary = run_small(clips, "clips", tmp_path, monkeypatch)
    assert summary["held_out_clips"] == 6
    for task in ("direction", "order", "number", "digits"):
        assert 0 <= summary[task] <= 1 and 0 <= summary[f"{task}_shuffled"] <= 1
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_world_of_small_digits_runs_at_small_size(tmp_path, monkeypatch):
    summary = run_small(glyphs, "glyphs", tmp_path, monkeypatch)
    assert summary["held_out_pictures"] == 6
    for name in ("one_scale", "scales"):
        assert 0 <= summary[f"digits_read_{name}"] <= 1 and 0 <= summary[f"digits_counted_{name}"] <= 1
    assert BliprenConfig.from_pretrained(tmp_path / "model").vision_scales == [1, 3]


def centre(frame, ground) -> np.ndarray:
    """Mean place `(x, y)` of what differs from the ground, as shares of the side."""
    rows, columns = np.nonzero(np.abs(np.asarray(frame, dtype=int) - ground).sum(-1) > 60)
    return np.array([columns.mean(), rows.mean()]) / frame.width


def test_shapes_move_where_the_answer_says():
    seen = set()
    for index in range(0, 90, 3):
        clip = make_clip(0, index)
        frames = draw_clip(clip, 8)
        way = centre(frames[-1], clip.ground) - centre(frames[0], clip.ground)
        assert np.abs(way - 0.45 * np.array(DIRECTIONS[clip.direction])).max() < 0.15
        _, questions = write_clip_texts(clip)
        assert dict(questions)["Which way does the shape move?"] == clip.direction
        seen.add(clip.direction)
    assert seen == set(DIRECTIONS)


def test_one_shape_takes_the_place_of_another():
    for index in range(1, 90, 3):
        clip = make_clip(0, index)
        frames = draw_clip(clip, 12)
        per_shape = 12 // len(clip.shapes)
        for number, place in enumerate(clip.starts):
            for frame in frames[number * per_shape : (number + 1) * per_shape]:
                assert np.abs(centre(frame, clip.ground) - place).max() < 0.04
        answers = dict(write_clip_texts(clip)[1])
        assert answers["Which shape comes first?"] == clip.shapes[0][1]
        assert answers["Which shape comes last?"] == clip.shapes[-1][1]
        assert not set(clip.shapes) & HELD_OUT_COMBINATIONS


def test_digits_follow_each_other():
    clip = make_clip(0, 2)
    frames = [np.asarray(frame) for frame in draw_clip(clip, 8)]
    assert all(np.array_equal(frames[2 * k], frames[2 * k + 1]) for k in range(4))
    assert write_clip_texts(clip)[1] == [("Which digits are shown?", " ".join(map(str, clip.digits)))]


def test_files_of_clips_hold_what_was_drawn(tmp_path):
    """Equal frames that follow each other are one longer frame of the file."""
    write_clips(tmp_path, 0, {"train": 12}, frames=8)
    clips = [make_clip(0, index) for index in range(12)]
    assert any(first == second for clip in clips for first, second in zip(clip.digits, clip.digits[1:]))
    for index, clip in enumerate(clips):
        frames = read_frames(tmp_path / "clips" / f"{index:05d}.webp", 8)
        assert all(np.array_equal(read, drawn) for read, drawn in zip(frames, draw_clip(clip, 8), strict=True))


def test_every_digit_is_drawn_as_its_font():
    assert len({font.tobytes() for font in FONT.values()}) == 10
    for digit, font in FONT.items():
        image = draw_glyphs(Image.new("RGB", (70, 70)), (Glyph(digit, 0.5, 0.5, 0.7, (255, 255, 255)),))
        points = np.asarray(image.convert("L"))[14:60:7, 21:52:7] // 255  # 7 x 5 points of 7 pixels, around (35, 35)
        assert np.array_equal(points, font)


def test_small_digits_stand_where_the_questions_say():
    for index in range(20):
        picture = make_digit_picture(0, index)
        image = draw_digit_picture(picture)
        assert image.size == (PICTURE_SIDE, PICTURE_SIDE)
        _, questions = write_digit_texts(picture)
        assert len(questions) == len(picture.glyphs) + 1
        for glyph, cell in zip(picture.glyphs, picture.cells):
            assert (int(3 * glyph.y), int(3 * glyph.x)) == (cell.row, cell.column)
            x, y, half = round(glyph.x * PICTURE_SIDE), round(glyph.y * PICTURE_SIDE), 12
            assert np.asarray(image)[y - half : y + half, x - half : x + half].std() > 10
            assert glyph.height * PICTURE_SIDE == 24  # six pixels of the encoder's 96
