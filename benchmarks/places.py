"""Where the place of an object is lost between image tower and answer: two measurements of the world of boxes.

    python benchmarks/places.py --out places.json

**What patch features hold**: probes that predict the box of an object from one patch.
The quickstart's image tower, drawn scenes; 600 scenes to fit, 150 to judge, and 150 with combinations that neither the tower
nor the probe has seen. A probe reads the features of one patch on the object, alone or with the patch's place in the grid,
which is what `patch_position_embeddings` adds. Linear: least squares; MLP: one hidden layer of 256, 1,500 steps.

**What the language model reads**: true notes on a scene, whose places are exact or moved by noise, stand where the visual
tokens would, and it is asked for the box of each object that is alone of its kind, and how many there are of each kind. No
image and no bridge take part, so this is what a perfect bridge would reach. The box has to overlap that of the notes, moved
or not.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipVisionModel

from blipren.grounding_blipren import read_places
from blipren.training.evaluation.metrics.boxes import THRESHOLD, box_iou
from blipren.training.quickstart.grounded_scenes import object_box
from blipren.training.quickstart.notes import Note
from blipren.training.quickstart.scenes import make_scene
from blipren.training.quickstart.steps import TOWERS
from blipren.training.quickstart.train_llm import read_notes
from blipren.training.quickstart.train_vision import GRID, patch_targets, pixels_of

NOISES = (0.0, 0.04)  # standard deviation of the notes' places, in shares of the side
ASKED = 40  # scenes
SETS = {"fit": (0, 600, "seen"), "seen": (5000, 150, "seen"), "unseen": (6000, 150, "unseen")}


@torch.no_grad()
def read_patches(model, start: int, count: int, group: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features, places in the grid and boxes (shares of the side) of all patches that lie on an object."""
    features, places, boxes = [], [], []
    for number in range(start, start + count):
        scene = make_scene(seed, number, group)
        states = model(pixel_values=pixels_of([scene])).last_hidden_state[0].numpy()
        for patch in patch_targets([scene])[0][:, 1].nonzero().flatten().tolist():
            y, x = ((v + 0.5) / GRID for v in divmod(patch, GRID))
            nearest = min(scene.objects, key=lambda o: max(abs(y - o.y), abs(x - o.x)) - o.radius)
            features.append(states[patch])
            places.append((x, y))
            boxes.append(object_box(nearest))
    return np.array(features), np.array(places), np.array(boxes)


def fit_linear(inputs: np.ndarray, targets: np.ndarray):
    """Return a function that predicts the targets by least squares."""
    rows = np.c_[inputs, np.ones(len(inputs))]
    weights = np.linalg.solve(rows.T @ rows + 1e-2 * np.eye(rows.shape[1]), rows.T @ targets)
    return lambda other: np.c_[other, np.ones(len(other))] @ weights


def fit_mlp(inputs: np.ndarray, targets: np.ndarray, steps: int):
    """Return a function that predicts the targets by an MLP, trained on the mean absolute error."""
    torch.manual_seed(0)
    rows, wanted = torch.tensor(inputs).float(), torch.tensor(targets).float()
    mean, deviation = rows.mean(0), rows.std(0)
    model = torch.nn.Sequential(torch.nn.Linear(rows.shape[1], 256), torch.nn.GELU(), torch.nn.Linear(256, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    for _ in range(steps):
        drawn = torch.randint(len(rows), (512,))
        loss = (model((rows[drawn] - mean) / deviation) - wanted[drawn]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lambda other: model((torch.tensor(other).float() - mean) / deviation).detach().numpy()


def ask(model, tokenizer, soft: torch.Tensor, question: str) -> str:
    """Return the model's answer to a question behind notes."""
    asked = model.get_input_embeddings()(torch.tensor(tokenizer.encode(question)))
    output = model.generate(inputs_embeds=torch.cat([soft, asked])[None], max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True).strip()


def ask_about_notes(model, tokenizer, scenes: list, noise: float, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU of the answers with the boxes of the notes, which are moved by noise, one for each object alone of its
    kind; and whether each kind is counted right."""
    ious, counted = [], []
    for scene in scenes:
        kinds = [o.combination for o in scene.objects]
        notes = []
        for o in scene.objects:
            across, down = rng.gauss(0, noise), rng.gauss(0, noise)
            x1, y1, x2, y2 = object_box(o)
            box = (x1 + across, y1 + down, x2 + across, y2 + down)
            notes.append(Note(f" {o.size} {o.colour} {o.shape}", tuple(min(1.0, max(0.0, v)) for v in box)))
        soft = read_notes(model, tokenizer, notes)
        for kind in dict.fromkeys(kinds):
            counted.append(ask(model, tokenizer, soft, f"Count every {' '.join(kind)}.") == str(kinds.count(kind)))
        for o, note in zip(scene.objects, notes):
            if kinds.count(o.combination) > 1:
                continue
            found = read_places(ask(model, tokenizer, soft, f"Find every {o.colour} {o.shape}.")).boxes
            ious.append(float(box_iou([found[0]], [[1000 * v for v in note.box]])[0, 0]) if found else 0.0)
    return np.array(ious), np.array(counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--vision", type=Path, default=TOWERS / "vision", help="folder of a SigLIP tower for 96x96 images"
    )
    parser.add_argument("--llm", type=Path, default=TOWERS / "boxes-llm", help="folder of a language model of notes")
    parser.add_argument("--steps", type=int, default=1500, help="steps of the MLP")
    parser.add_argument("--share", type=float, default=1.0, help="share of the scenes")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    model = SiglipVisionModel.from_pretrained(options.vision, dtype=torch.float32).eval()
    sets = {
        name: read_patches(model, start, max(8, round(count * options.share)), group, options.seed)
        for name, (start, count, group) in SETS.items()
    }
    arms = {
        "place in the grid": lambda f, p: p,
        "features": lambda f, p: f,
        "features and place": lambda f, p: np.c_[f, p],
    }
    figures: dict[str, dict] = {}
    features, places, boxes = sets["fit"]
    place = fit_linear(features, places)(sets["seen"][0]) - sets["seen"][1]
    figures["place in the grid from features, linear"] = {"mean error": round(float(np.abs(place).mean()), 4)}
    for name, pick in arms.items():
        for kind, fit in (("linear", fit_linear), ("MLP", lambda i, t: fit_mlp(i, t, options.steps))):
            predict = fit(pick(features, places), boxes)
            for group in ("seen", "unseen"):
                found, true = predict(pick(*sets[group][:2])), sets[group][2]
                iou = np.array([box_iou(a, b)[0, 0] for a, b in zip(found, true)])
                figures[f"{name}, {kind}, {group}"] = {
                    "mean error": round(float(np.abs(found - true).mean()), 4),
                    "IoU 0.5": round(float((iou >= THRESHOLD).mean()), 3),
                    "mean IoU": round(float(iou.mean()), 3),
                }
    llm = AutoModelForCausalLM.from_pretrained(options.llm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.llm)
    for group in ("seen", "unseen"):
        start = SETS[group][0]
        scenes = [
            make_scene(options.seed, n, group) for n in range(start, start + max(4, round(ASKED * options.share)))
        ]
        for noise in NOISES:
            iou, counted = ask_about_notes(
                llm, tokenizer, scenes, noise, random.Random(f"{options.seed}/{group}/{noise}")
            )
            figures[f"language model, notes moved by {noise}, {group}"] = {
                "IoU 0.5": round(float((iou >= THRESHOLD).mean()), 3),
                "mean IoU": round(float(iou.mean()), 3),
                "questions": len(iou),
                "counting": round(float(counted.mean()), 3),
            }
    for name, values in figures.items():
        print(f"{name:44}" + ", ".join(f"{key} {value}" for key, value in values.items()))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
