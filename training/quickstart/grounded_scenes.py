"""What is where in a scene: boxes of its objects, and a caption with boxes."""

import random
from collections.abc import Iterator

from blipren.training.data.sources.grounding import GroundedCaption, GroundedObject, GroundTruth
from blipren.training.quickstart.scenes import Scene, SceneObject, Split, iterate_rows, outline
from blipren.training.quickstart.wording import absent_combination, article


def object_box(o: SceneObject) -> tuple[float, float, float, float]:
    """Return the box around a shape as drawn: x1, y1, x2, y2 as shares of the image's side."""
    if o.shape == "circle":
        corners = [(o.x - o.radius, o.y - o.radius), (o.x + o.radius, o.y + o.radius)]
    else:
        corners = outline(o, 1)
    across, down = zip(*corners)
    return (max(0.0, min(across)), max(0.0, min(down)), min(1.0, max(across)), min(1.0, max(down)))


def scene_truth(scene: Scene, rng: random.Random, held_out: bool = False, absent: int = 1) -> GroundTruth:
    """Return boxes, absent objects and a caption with boxes of a scene, in shares of the image's side.

    Args:
        held_out: whether an absent object may be a held-out combination. Never in training.
        absent: number of absent objects to name.
    """
    objects = [GroundedObject(f"{o.colour} {o.shape}", object_box(o)) for o in scene.objects]
    text, phrases = "", []
    for k, thing in enumerate(objects):
        text += ("" if k == 0 else " and " if k == len(objects) - 1 else ", ") + article(thing.category)
        phrases.append((len(text), (thing.box,)))
    names = {" ".join(absent_combination(scene, rng, held_out)) for _ in range(absent)}
    return GroundTruth(objects, sorted(names), [GroundedCaption(text, tuple(phrases))])


def iterate_grounded_rows(seed: int, splits: tuple[Split, ...]) -> Iterator[dict]:
    """Yield the rows of `iterate_rows` with boxes in shares of the sides, absent objects and captions with boxes."""
    for row in iterate_rows(seed, splits):
        rng = random.Random(f"{seed}/places/{row['file_name']}")
        truth = scene_truth(Scene.from_json(row["scene"]), rng, held_out=row["group"] == "unseen")
        captions = []
        for caption in truth.captions:
            starts = [0, *(end for end, _ in caption.phrases)]
            phrases = [
                {"phrase": caption.text[start:end].removeprefix(", ").removeprefix(" and "), "bbox": list(boxes[0])}
                for start, (end, boxes) in zip(starts, caption.phrases)
            ]
            captions.append({"caption": caption.text, "phrases": phrases})
        yield row | {
            "objects": [{"category": o.category, "bbox": list(o.box)} for o in truth.objects],
            "bbox_format": "xyxyn",
            "absent": truth.absent,
            "grounded_captions": captions,
        }
