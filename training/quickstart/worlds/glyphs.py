"""Pictures with digits a few pixels high, of four times the side that the encoder sees, asked for at one scale and at two.

    pictures -> for scale 1, then scales 1 3: new -> embed -> train -> answers on held-out pictures

OUT holds `pictures/` (384 x 384 pixels, with metadata), `one_scale/` and `scales/` with `untrained/`, `cache/` and `run/` each,
`model/` (the full checkpoint with scales) and `summary.json`.
"""

import json
from pathlib import Path

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.quickstart.glyphs import PICTURE_SIDE, draw_digit_picture, make_digit_picture, write_digit_texts
from blipren.training.quickstart.steps import TOWERS, export_model, run_step

DURATION = "takes about ten minutes on two cores"
RECIPE = "quickstart-glyphs"
SPLITS = {"train": 1800, "validation": 60, "test": 200}
SCALES = [1, 3]


def run_world(settings: QuickstartSettings, out: Path) -> dict:
    """Run all steps twice. Returns the share of digits that are read on held-out pictures, with one scale and with two."""
    pictures = out / "pictures"
    count = write_pictures(pictures, settings.seed)
    print(f"drew {count} pictures of {PICTURE_SIDE}x{PICTURE_SIDE} pixels in {pictures}")
    towers = {"vision": [str(TOWERS / "glyphs-vision")], "llm": TOWERS / "glyphs-llm"}
    summary: dict = {"held_out_pictures": SPLITS["test"]}
    for name, scales in (("one_scale", [1]), ("scales", SCALES)):
        untrained, cache, run = (out / name / n for n in ("untrained", "cache", "run"))
        run_step("new", RECIPE, out=untrained, seed=settings.seed, scales=scales, **towers)
        run_step("embed", RECIPE, model=untrained, dataset=pictures, cache=cache)
        run_step("train", RECIPE, model=untrained, cache=cache, out=run, seed=settings.seed)
        summary |= {f"{key}_{name}": value for key, value in judge_answers(run, cache).items()}
    export_model(out / "scales" / "run", out / "model")
    for name, value in summary.items():
        print(f"{name:<28} {value:.1%}" if isinstance(value, float) else f"{name:<28} {value}")
    return summary


def write_pictures(folder: Path, seed: int) -> int:
    """Write a folder of pictures with `metadata.jsonl`. Returns their number."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for split, count in SPLITS.items():
        for index in range(len(lines), len(lines) + count):
            picture, name = make_digit_picture(seed, index), f"images/{index:05d}.png"
            draw_digit_picture(picture).save(folder / name, compress_level=1)
            caption, questions = write_digit_texts(picture)
            row = {"file_name": name, "caption": caption, "split": split}
            lines.append(
                json.dumps(row | {"questions": [q for q, _ in questions], "answers": [a for _, a in questions]})
            )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def judge_answers(run: Path, cache_folder: Path) -> dict:
    """Return the share of right answers on the test pictures: which digit is where, and how many there are."""
    import torch

    from blipren.training.data.cache import FeatureCache
    from blipren.training.engine.loading import load_checkpoint
    from blipren.training.evaluation.features import PatchFeatures
    from blipren.training.evaluation.generation import generate_answers

    model, processor = load_checkpoint(str(run), dtype=torch.float32)
    cache = FeatureCache.open(cache_folder)
    rows = cache.split("test")
    patches, _ = cache.patch_features("test", list(range(len(rows))))
    asked = [
        (number, prompt, answer)
        for number, row in enumerate(rows)
        for prompt, answer in zip(row["prompts"], row["answers"])
        if prompt is not None
    ]
    features = PatchFeatures(patches)[[number for number, _, _ in asked]]
    answers = generate_answers(model, processor, features, [prompt for _, prompt, _ in asked], max_new_tokens=6)
    right: dict[str, list[bool]] = {"digits_read": [], "digits_counted": []}
    for (_, prompt, wanted), found in zip(asked, answers):
        key = "digits_counted" if prompt.startswith("How many") else "digits_read"
        right[key].append(found["text"].strip() == wanted)
    return {key: round(sum(own) / len(own), 4) for key, own in right.items()}
