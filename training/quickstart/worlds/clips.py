"""Clips of shapes that move and follow each other, and of digits: direction, order and number, and whether frames count.

    clips -> new --frames 8 -> embed -> train -> answers on held-out clips, with their frames in order and shuffled

OUT holds `clips/` (animations with metadata), `untrained/`, `cache/`, `run/` (log and curves of the training), `model/` (the
full checkpoint) and `summary.json`.
"""

import random
from pathlib import Path

from blipren.training.commands.quickstart import QuickstartSettings
from blipren.training.quickstart.clips import DIGITS, KINDS, write_clips
from blipren.training.quickstart.steps import TOWERS, export_model, run_step

DURATION = "takes some minutes on two cores"
RECIPE = "quickstart-clips"
SPLITS = {"train": 1800, "validation": 60, "test": 300}
TASKS = {  # question -> name in the summary
    "Which way does the shape move?": "direction",
    "Which shape comes first?": "order",
    "Which shape comes last?": "order",
    "How many shapes are there?": "number",
    "Which digits are shown?": "digits",
}


def run_world(settings: QuickstartSettings, out: Path) -> dict:
    """Run all steps. Returns the accuracy on held-out clips by task, with frames in order and shuffled."""
    clips, untrained, cache, run, model = (out / n for n in ("clips", "untrained", "cache", "run", "model"))
    count = write_clips(clips, settings.seed, SPLITS, frames=8)
    print(f"drew {count} clips in {clips}: {', '.join(KINDS)}, {DIGITS} digits each")
    towers = {"vision": [str(TOWERS / "glyphs-vision")], "llm": TOWERS / "glyphs-llm"}
    run_step("new", RECIPE, out=untrained, seed=settings.seed, **towers)
    run_step("embed", RECIPE, model=untrained, dataset=clips, cache=cache)
    run_step("train", RECIPE, model=untrained, cache=cache, out=run, seed=settings.seed)
    export_model(run, model)
    summary = judge_answers(model, cache, settings.seed)
    for name, value in summary.items():
        print(f"{name:<24} {value:.1%}" if isinstance(value, float) else f"{name:<24} {value}")
    return summary


def judge_answers(folder: Path, cache_folder: Path, seed: int) -> dict:
    """Return the share of right answers on the test clips by task, and with the frames of each clip shuffled."""
    import torch

    from blipren.training.data.cache import FeatureCache
    from blipren.training.engine.loading import load_checkpoint
    from blipren.training.evaluation.features import PatchFeatures
    from blipren.training.evaluation.generation import generate_answers

    model, processor = load_checkpoint(str(folder), dtype=torch.float32)
    cache = FeatureCache.open(cache_folder)
    rows = cache.split("test")
    patches, _ = cache.patch_features("test", list(range(len(rows))))
    frames = patches.unflatten(1, (model.config.num_frames, -1))
    rng = random.Random(seed)
    orders = [rng.sample(range(model.config.num_frames), model.config.num_frames) for _ in range(len(rows))]
    shuffled = torch.stack([own[order] for own, order in zip(frames, orders)]).flatten(1, 2)
    asked = [
        (number, prompt, answer)
        for number, row in enumerate(rows)
        for prompt, answer in zip(row["prompts"], row["answers"])
        if prompt in TASKS
    ]
    summary: dict = {"held_out_clips": len(rows)}
    for given, suffix in ((patches, ""), (shuffled, "_shuffled")):
        features = PatchFeatures(given)[[number for number, _, _ in asked]]
        answers = generate_answers(model, processor, features, [prompt for _, prompt, _ in asked], max_new_tokens=12)
        right: dict[str, list[bool]] = {}
        for (_, prompt, wanted), found in zip(asked, answers):
            right.setdefault(TASKS[prompt], []).append(found["text"].strip() == wanted)
        summary |= {task + suffix: round(sum(own) / len(own), 4) for task, own in right.items()}
    return summary
