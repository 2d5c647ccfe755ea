"""Training of the image towers of the drawn worlds: a linear head on every patch predicts the object there."""

import dataclasses
import math
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from blipren.training.quickstart.glyphs import ASPECT, FONT, Glyph, draw_glyphs, random_ink
from blipren.training.quickstart.grounded_scenes import object_box
from blipren.training.quickstart.notes import PLACE_WORDS, place_weights
from blipren.training.quickstart.optimization import make_optimizer, save_half_precision, take_step
from blipren.training.quickstart.scenes import (
    COLOURS,
    HELD_OUT_COMBINATIONS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    is_held_out_pair,
    make_scene,
)

PATCH = 12
GRID = IMAGE_SIZE // PATCH
WIDTH = 128


def random_shade(shape: str, rng: random.Random) -> tuple[int, int, int]:
    """Return a random colour far from the one that is held out for this shape."""
    held_out = [COLOURS[c] for c, s in HELD_OUT_COMBINATIONS if s == shape]
    while True:
        rgb = tuple(rng.randrange(256) for _ in range(3))
        if all(math.dist(rgb, other) > 80 for other in held_out):
            return rgb


def vision_scene(seed: int, index: int) -> Scene:
    """Return a scene for the image tower. Half of the scenes are crowded, and some objects have a shade without a name.

    More objects give more targets in the same time. Shades without a name separate shapes from colours. No scene has a
    held-out combination or pair.
    """
    rng = random.Random(f"{seed}/vision/{index}")
    scene = make_scene(seed, index)
    objects = list(scene.objects)
    if rng.random() < 0.5:
        taken = {(o.row, o.column) for o in objects}
        for number in range(4):
            more = make_scene(seed, 10**8 + 4 * index + number).objects
            kinds = {o.combination for o in objects}
            if taken & {(o.row, o.column) for o in more}:
                continue
            if any(is_held_out_pair(o.combination, kind) for o in more for kind in kinds):
                continue
            objects += more
            taken |= {(o.row, o.column) for o in more}
    for k, o in enumerate(objects):
        if rng.random() < 0.65:
            objects[k] = dataclasses.replace(o, colour="unnamed", rgb=random_shade(o.shape, rng))
    return Scene(tuple(objects), scene.ground)


def patch_targets(scenes: list[Scene]) -> Tensor:
    """Return what is at each patch: [batch, patches, 6] indices of colour, shape, size, row, column (0 is nothing), and
    the number of objects of the scene with the same colour and shape. -100 if the colour has no name. Patches of the
    ground have row and column too, so that a query can attend to an empty place."""
    centres = (np.arange(GRID) + 0.5) / GRID
    targets = np.zeros((len(scenes), GRID, GRID, 6), dtype=np.int64)
    targets[..., 3] = (centres * 3).astype(int)[:, None] + 1
    targets[..., 4] = (centres * 3).astype(int)[None, :] + 1
    for k, scene in enumerate(scenes):
        nearest = np.full((GRID, GRID), np.inf)
        for o in scene.objects:
            distance = np.maximum(abs(centres[:, None] - o.y), abs(centres[None, :] - o.x)) - o.radius
            here = (distance < 0.035) & (distance < nearest)
            nearest[here] = distance[here]
            named = o.colour in COLOURS
            colour = list(COLOURS).index(o.colour) + 1 if named else -100
            twins = min(3, sum(p.combination == o.combination for p in scene.objects)) if named else -100
            size = list(SIZES).index(o.size) + 1
            targets[k][here] = [colour, SHAPES.index(o.shape) + 1, size, o.row + 1, o.column + 1, twins]
    return torch.from_numpy(targets.reshape(len(scenes), GRID * GRID, 6))


def box_targets(scenes: list[Scene], targets: Tensor) -> Tensor:
    """Return the box of the object at each patch as `place_weights` writes it: [batch, patches, PLACE_WORDS].

    Args:
        targets: of `patch_targets`; patches without an object are 0.
    """
    centres = (np.arange(GRID) + 0.5) / GRID
    boxes = torch.zeros(*targets.shape[:2], PLACE_WORDS)
    for own, scene, there in zip(boxes, scenes, targets[..., 1] > 0):
        weights = torch.tensor([place_weights(object_box(o)) for o in scene.objects])
        for patch in there.nonzero().flatten().tolist():
            y, x = centres[patch // GRID], centres[patch % GRID]
            distances = [max(abs(y - o.y), abs(x - o.x)) - o.radius for o in scene.objects]
            own[patch] = weights[int(np.argmin(distances))]
    return boxes


BOX_WEIGHT = 2.0  # of the mean absolute error of the box, beside the losses of the classes
HEAD_SIZES = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1, 4, 4, 4)


def to_pixels(pictures: list[Image.Image]) -> Tensor:
    """Return images as the image processor gives them: [batch, 3, side, side] from -1 to 1."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Draw scenes as the image processor gives them: [batch, 3, side, side] from -1 to 1."""
    return to_pixels([draw_scene(s) for s in scenes])


def shape_batch(seed: int, indices: range) -> tuple[Tensor, Tensor]:
    """Return pixels and patch targets of scenes of shapes."""
    scenes = [vision_scene(seed, i) for i in indices]
    return pixels_of(scenes), patch_targets(scenes)


def box_batch(seed: int, indices: range) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels, patch targets and box targets of scenes of shapes."""
    scenes = [vision_scene(seed, i) for i in indices]
    targets = patch_targets(scenes)
    return pixels_of(scenes), targets, box_targets(scenes, targets)


GLYPH_SCALE = 4  # digits of a few pixels need smooth edges
GLYPH_HEIGHTS = (0.022, 0.6)  # as shares of the side: from two pixels up


def glyph_picture(seed: int, index: int) -> tuple[Image.Image, tuple[Glyph, ...]]:
    """Return a picture with up to nine small digits, or one large one, anywhere and of any size and colour."""
    rng = random.Random(f"{seed}/glyphs/{index}")
    ground = make_scene(seed, index).ground
    glyphs: list[Glyph] = []
    for _ in range(rng.randint(1, 9)):
        height = math.exp(rng.uniform(*map(math.log, GLYPH_HEIGHTS)))
        place = (
            (rng.uniform(0, 1), rng.uniform(0, 1)) if height < 0.3 else (rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))
        )
        glyph = Glyph(rng.randrange(10), *place, height, random_ink(rng, ground))
        if all(max(abs(glyph.x - o.x), abs(glyph.y - o.y)) > 0.6 * (glyph.height + o.height) + 0.05 for o in glyphs):
            glyphs.append(glyph)
    side = IMAGE_SIZE * GLYPH_SCALE
    return draw_glyphs(Image.new("RGB", (side, side), ground), tuple(glyphs)).reduce(GLYPH_SCALE), tuple(glyphs)


def glyph_targets(pictures: list[tuple[Glyph, ...]]) -> Tensor:
    """Return which digit is at each patch: [batch, patches, 7], as [`patch_targets`] with the digit plus one behind it.

    A digit is at the patch that holds its centre, and at those whose centre it covers.
    """
    ground = patch_targets([Scene((), (0, 0, 0))] * len(pictures))
    targets = F.pad(ground, (0, 1)).view(len(pictures), GRID, GRID, 7)
    cells = np.arange(GRID)
    centres = (cells + 0.5) / GRID
    for own, glyphs in zip(targets, pictures):
        for g in glyphs:
            rows = (abs(centres - g.y) < g.height / 2) | (cells == int(g.y * GRID))
            columns = (abs(centres - g.x) < g.height * ASPECT / 2) | (cells == int(g.x * GRID))
            here = torch.from_numpy(rows[:, None] & columns[None])
            own[..., 0][here], own[..., 6][here] = -100, g.digit + 1  # digits have shades without a name
    return targets.flatten(1, 2)


def glyph_batch(seed: int, indices: range) -> tuple[Tensor, Tensor]:
    """Return pixels and patch targets of one third scenes of shapes and two thirds pictures of digits."""
    split = indices[len(indices) // 3]
    pixels, targets = shape_batch(seed, range(indices[0], split))
    targets = torch.cat([targets, torch.zeros_like(targets[..., :1])], dim=-1)
    pictures, glyphs = zip(*(glyph_picture(seed, i) for i in range(split, indices[-1] + 1)))
    return torch.cat([pixels, to_pixels(list(pictures))]), torch.cat([targets, glyph_targets(list(glyphs))])


def train_vision(
    out: Path,
    seed: int,
    steps: int,
    batch: int,
    glyphs: bool = False,
    boxes: bool = False,
    start: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> None:
    """Train the image tower with a linear head on every patch, and write it without that head.

    Args:
        glyphs: train it on digits too.
        boxes: every patch on an object also predicts the object's box, in float32, since bfloat16 is too coarse for it.
        start: tower to continue from.
        workers: processes that draw.
    """
    torch.manual_seed(seed)
    if start is None:
        config = SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            vision_use_head=False,
        )
        model = SiglipVisionModel(config)
    else:
        model = SiglipVisionModel.from_pretrained(start, dtype=torch.float32)
    model.set_attn_implementation("eager")
    head_sizes = (*HEAD_SIZES, len(FONT) + 1) if glyphs else HEAD_SIZES
    head = nn.Linear(WIDTH, sum(head_sizes) + boxes * PLACE_WORDS)
    both = nn.ModuleList([model, head]).to(device)
    print(f"vision: {model.num_parameters():,} parameters")
    optimizer, schedule = make_optimizer(both.parameters(), 1.5e-3, steps)
    batches = DataLoader(
        [range(step * batch, (step + 1) * batch) for step in range(steps)],
        batch_size=None,
        collate_fn=partial(glyph_batch if glyphs else box_batch if boxes else shape_batch, seed + 1),
        num_workers=workers,
    )
    started = time.process_time()
    for step, (pixels, targets, *places) in enumerate(batches):
        pixels, targets = pixels.to(device), targets.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=not boxes):
            states = model(pixel_values=pixels).last_hidden_state
        logits = head(states.float())
        there = targets[..., 1] > 0
        if glyphs:
            there |= targets[..., 6] > 0
        weight = torch.where(there, 1.0, 0.25).flatten()  # most patches are ground
        loss, right = 0.0, []
        for k, part in enumerate(logits[..., : sum(head_sizes)].split(head_sizes, dim=-1)):
            losses = F.cross_entropy(part.flatten(0, 1), targets[..., k].flatten(), reduction="none")
            loss = loss + (losses * weight).sum() / weight.sum()
            named = there & (targets[..., k] > 0)
            right.append((part.argmax(-1) == targets[..., k])[named].float().mean().item())
        if boxes:
            misses = (logits[..., sum(head_sizes) :] - places[0].to(device)).abs()[there].mean(dim=0)
            loss = loss + BOX_WEIGHT * misses.mean()
            right.append(misses[:: PLACE_WORDS // 4].mean().item() / 2)
        take_step(loss, both, optimizer, schedule)
        if step % 50 == 0 or step == steps - 1:
            seconds = time.process_time() - started
            shares = ", ".join(f"{r:.3f}" for r in right)
            print(f"vision: step {step}, loss {loss.item():.4f}, right {shares}, {seconds:.0f} s", flush=True)
        if step % 500 == 499 or step == steps - 1:
            save_half_precision(model, out)
            SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(out)
