"""Objects that a caption names and the image does not have: CHAIR over COCO categories, or the verdicts of a judge.

CHAIR (Rohrbach et al. 2018, arXiv:1809.02156): a caption's object words are mapped to the 80 COCO categories. An object
is hallucinated if neither the boxes nor the reference captions have it. `CHAIR_i` is the share of hallucinated object
mentions, `CHAIR_s` the share of captions with at least one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blipren.training.evaluation.judges import Judge
from blipren.training.evaluation.metrics.bootstrap import Statistic, mean_statistic
from blipren.training.evaluation.metrics.tokenizer import ptb_tokens

# COCO category: other words for it, in the singular. Words of two meanings ("bat", "bank", "glass") are left out.
COCO_WORDS = {
    "person": "man woman boy girl child kid toddler baby infant lady guy gentleman adult teenager teen people men women "
    "children player skier snowboarder surfer skateboarder rider cyclist biker swimmer climber hiker runner jogger "
    "dancer performer musician worker officer policeman fireman soldier tourist pedestrian spectator bystander crowd "
    "bride groom couple friend mother father son daughter brother sister someone cowboy chef waiter driver passenger "
    "pitcher batter catcher umpire referee athlete acrobat clown bicyclist motorcyclist skater gymnast "
    "cheerleader toddlers human",
    "bicycle": "bike tricycle",
    "car": "sedan taxi cab suv van minivan hatchback",
    "motorcycle": "motorbike scooter moped dirtbike",
    "airplane": "plane aeroplane jet aircraft jetliner airliner",
    "bus": "minibus",
    "train": "locomotive tram",
    "truck": "pickup lorry firetruck",
    "boat": "ship sailboat kayak canoe raft yacht ferry rowboat",
    "traffic light": "stoplight",
    "fire hydrant": "hydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "",
    "bird": "duck goose geese seagull pigeon parrot eagle owl swan flamingo penguin gull heron pelican",
    "cat": "kitten kitty",
    "dog": "puppy pup poodle terrier retriever greyhound labrador collie dalmatian hound bulldog dachshund spaniel "
    "chihuahua husky beagle rottweiler pug doggie",
    "horse": "pony colt foal stallion mare",
    "sheep": "lamb ram ewe",
    "cow": "cattle bull calf ox oxen",
    "elephant": "",
    "bear": "cub panda",
    "zebra": "",
    "giraffe": "",
    "backpack": "knapsack rucksack",
    "umbrella": "parasol",
    "handbag": "purse",
    "tie": "necktie",
    "suitcase": "luggage",
    "frisbee": "",
    "skis": "ski",
    "snowboard": "",
    "sports ball": "football baseball basketball volleyball soccer_ball tennis_ball beach_ball",
    "kite": "",
    "baseball bat": "",
    "baseball glove": "mitt",
    "skateboard": "",
    "surfboard": "bodyboard wakeboard",
    "tennis racket": "racket racquet",
    "bottle": "",
    "wine glass": "wineglass",
    "cup": "mug",
    "fork": "",
    "knife": "",
    "spoon": "",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "burger hamburger",
    "orange": "",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog",
    "pizza": "",
    "donut": "doughnut",
    "cake": "cupcake",
    "chair": "stool armchair",
    "couch": "sofa loveseat",
    "potted plant": "houseplant",
    "bed": "",
    "dining table": "table desk",
    "toilet": "",
    "tv": "television monitor",
    "laptop": "",
    "mouse": "",
    "remote": "",
    "keyboard": "",
    "cell phone": "phone cellphone smartphone",
    "microwave": "",
    "oven": "stove",
    "toaster": "",
    "sink": "",
    "refrigerator": "fridge",
    "book": "",
    "clock": "",
    "vase": "",
    "scissors": "",
    "teddy bear": "teddy",
    "hair drier": "hairdryer",
    "toothbrush": "",
}
# phrases that contain a category's word and mean no such object
_NOT_OBJECTS = ("hot dog stand", "orange juice", "cat walk", "train track", "bear crawl", "dirt bike trail")
_COLOURS = {"orange"}  # a colour unless nothing follows that it could colour
_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "knives": "knife",
    "calves": "calf",
}


def singular(word: str) -> str:
    """Return the singular of an English noun as captions use it. Words that only look plural stay as they are."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in ("skis", "scissors", "bus", "grass", "glass", "canvas", "tennis") or len(word) < 4:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


@functools.cache
def _lexicon() -> dict[tuple[str, ...], str]:
    """Return the COCO category of each phrase, "" for phrases that name no object."""
    table = {}
    for category, words in COCO_WORDS.items():
        for phrase in (category, *(word.replace("_", " ") for word in words.split())):
            table[tuple(singular(w) for w in phrase.split())] = category
    for phrase in _NOT_OBJECTS:
        table[tuple(singular(w) for w in phrase.split())] = ""
    return table


def coco_objects(caption: str) -> list[str]:
    """Return the COCO category of each object mention of a caption, in order. The longest phrase wins."""
    words = [singular(token) for token in ptb_tokens(caption)]
    found, i = [], 0
    while i < len(words):
        for length in (3, 2, 1):
            phrase = tuple(words[i : i + length])
            if len(phrase) == length and phrase in _lexicon():
                followed = i + length < len(words) and words[i + length] not in (
                    "and",
                    "on",
                    "in",
                    "with",
                    "is",
                    "are",
                )
                category = _lexicon()[phrase]
                if category and not (category in _COLOURS and followed):
                    found.append(category)
                i += length
                break
        else:
            i += 1
    return found


@dataclass
class Hallucination:
    """Object mentions and hallucinated object mentions of every image.

    Attributes:
        values: shares over the set.
        per_image: id -> `mentions` (number of named objects), `hallucinated` (those that the image does not have), and
            `objects` (CHAIR) or `true`, `problems`, `attribute_recall` (a judge).
        statistics: for intervals. basis: what the verdicts rest on.
    """

    values: dict[str, float]
    per_image: dict[str, dict]
    statistics: dict[str, Statistic]
    basis: str


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def image_statistics(per_image: Sequence[Mapping]) -> dict[str, Statistic]:
    """Return the metrics of rows of `Hallucination.per_image`: those of a judge if the rows have `true`, else CHAIR."""
    rows = np.array([[len(own["hallucinated"]), own["mentions"]] for own in per_image], dtype=np.float64)
    share = Statistic(rows, _ratio)
    if "true" not in per_image[0]:
        return {"CHAIR_i": share, "CHAIR_s": mean_statistic([bool(own["hallucinated"]) for own in per_image])}
    means = {"captions_true": "true", "attribute_recall": "attribute_recall"}
    found = {name: mean_statistic([own[key] for own in per_image]) for name, key in means.items()}
    return found | {"hallucinated_objects": share}


def _hallucination(per_image: dict[str, dict], basis: str) -> Hallucination:
    statistics = image_statistics(list(per_image.values()))
    values: dict[str, float] = {name: statistic.value for name, statistic in statistics.items()}
    values |= {"mentions": sum(own["mentions"] for own in per_image.values()), "images": len(per_image)}
    return Hallucination(values, per_image, statistics, basis)


def chair(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    boxes: Mapping[str, Sequence[str]] | None = None,
) -> Hallucination:
    """Compute CHAIR of captions.

    Args:
        captions: id -> caption. references: id -> reference captions.
        boxes: id -> categories of annotated objects; ids without them are left out. None takes the references alone,
            which counts objects as hallucinated that are in the image but that nobody mentioned: an upper bound.
    """
    per_image = {}
    for key, caption in captions.items():
        if boxes is not None and key not in boxes:
            continue
        there = {category for text in references[key] for category in coco_objects(text)}
        there |= set(boxes[key]) if boxes is not None else set()
        named = coco_objects(caption)
        missing = [c for c in named if c not in there]
        per_image[key] = {"objects": named, "mentions": len(named), "hallucinated": missing}
    basis = "reference captions alone: an upper bound" if boxes is None else "annotated objects and reference captions"
    return _hallucination(per_image, basis)


def judge_captions(captions: Mapping[str, str], contents: Mapping[str, Any], judge: Judge) -> Hallucination:
    """Judge captions by the known content of their pictures: shares of true captions and of hallucinated objects.

    Args:
        captions: id -> caption. contents: id -> content of the picture, as the judge reads it.
    """
    verdicts = {key: judge.judge_caption(caption, contents[key]) for key, caption in captions.items()}
    per_image = {
        key: {
            "true": v.true,
            "problems": list(v.problems),
            "attribute_recall": v.attribute_recall,
            "mentions": v.mentioned,
            "hallucinated": ["?"] * v.hallucinated,
        }
        for key, v in verdicts.items()
    }
    return _hallucination(per_image, judge.basis)
