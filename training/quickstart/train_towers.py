"""Train the two small towers that `blipren quickstart` joins. Their weights are committed beside this file.

    python -m blipren.training.quickstart.train_towers --part all --out first --seed 0
    python -m blipren.training.quickstart.train_towers --part llm --start first/llm --out second --seed 1 \
        --llm-steps 2500 --shuffled 0.7
    python -m blipren.training.quickstart.train_towers --part llm --start second/llm --out training/quickstart/towers \
        --seed 2 --llm-steps 8000 --shuffled 0.7 --crowded
    cp -r first/vision training/quickstart/towers/

write `vision/` (a SigLIP image tower) and `llm/` (a Llama with its tokenizer), in float16, in some 70 minutes on one core:
first notes in the order in which a caption names their objects, then notes in any order, then mostly of three objects,
whose words the model of the second step still mixed up. Neither tower ever sees a held-out combination of colour and shape
(see `scenes.py`): the image tower is trained on scenes of the group "seen" alone, the language model on text about such
scenes and never on an image.

- Image tower: one linear head on every patch tells colour, shape, size and place of the object there.
- Language model: captions and answers behind the prompts that the processor writes. Most texts begin with notes that
  list a scene's objects, so that the model learns to say what it is shown instead of what is common.
"""

import argparse
import copy
import dataclasses
import json
import math
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from blipren.training.quickstart.scenes import (
    COLOURS,
    COLUMNS,
    HELD_OUT_COMBINATIONS,
    IMAGE_SIZE,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    is_held_out_pair,
    make_scene,
)
from blipren.training.quickstart.wording import NUMBERS, place_answer, plural, write_captions, write_questions


class Cell(NamedTuple):
    """A place without an object."""

    row: int
    column: int


PATCH = 12
GRID = IMAGE_SIZE // PATCH
WIDTH = 128
CAPTION_PROMPTS = ("Short caption:", "Short caption:", "Short caption:", "Caption:", "Describe the image:")
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"

# Texts about colours and shapes that no scene has: the model learns that any colour goes with any shape.
MOST_WORDS = 5  # of one position of the notes
EMPTY_CELLS = [Cell(row, column) for row in range(3) for column in range(3)]
MORE_COLOURS = tuple(
    "pink brown gray cyan golden silver beige teal maroon navy olive violet indigo crimson ivory bronze".split()
)
MORE_SHAPES = tuple("heart ring arrow hexagon moon cube cone leaf cloud bell key lamp boat tree house fish".split())


# ---------------------------------------------------------------------------------------------- tokenizer and text
def write_notes(scene: Scene, rng: random.Random, shuffled: float) -> list[str]:
    """What is in a scene, as positions in front of the prompt. The embeddings of a position's words are added up.

    The words of an object are one position, " large red circle top left", as a soft token stands for an object or a
    region: mostly in reading order, sometimes told twice, with positions between that tell of nothing, " nothing bottom".
    """
    objects = list(scene.objects)
    if rng.random() < shuffled:
        rng.shuffle(objects)
    most = rng.choice((1, 1, 1, 2))
    notes = []
    for o in objects:
        notes += [f" {o.size} {o.colour} {o.shape} {place_answer(o)}"] * rng.randint(1, most)
    taken = {(o.row, o.column) for o in objects}
    free = [f" {place_answer(cell)}" for cell in EMPTY_CELLS if (cell.row, cell.column) not in taken]
    for _ in range(rng.randrange(17 - len(notes))):
        notes.insert(rng.randint(0, len(notes)), rng.choice((" nothing", " nothing" + rng.choice(free))))
    return notes


def rename(texts: list[str], scene: Scene, rng: random.Random) -> list[str]:
    """The same texts about colours or shapes that no scene has."""
    share = rng.random()
    swaps = {c: n for c, n in zip(COLOURS, rng.sample(MORE_COLOURS, len(COLOURS))) if rng.random() < share}
    swaps |= {s: n for s, n in zip(SHAPES, rng.sample(MORE_SHAPES, len(SHAPES))) if rng.random() < share}
    swaps |= {plural(s): n + "s" for s, n in swaps.items() if s in SHAPES}
    pattern = re.compile(rf"\b({'|'.join(swaps)})\b")
    texts = [pattern.sub(lambda m: swaps[m[1]], t) for t in texts] if swaps else texts
    return [re.sub(r"\ban? (?=(\w))", lambda m: "an " if m[1] in "aeiou" else "a ", t) for t in texts]


@dataclasses.dataclass(frozen=True)
class Course:
    """What a run of the language model practises."""

    shuffled: float = 0.1
    """Share of texts whose notes are in any order: queries find their own."""
    crowded: bool = False
    """Most scenes have three objects: what belongs to which, and which look alike, is the hard part."""


def write_document(seed: int, index: int, course: Course) -> tuple[list[str], list[tuple[str, str]]]:
    """One training text: notes on a scene, a position each, and prompts with answers about it."""
    rng = random.Random(f"{seed}/text/{index}")
    scene = make_scene(seed, index)
    for number in range(2 if course.crowded else 0):
        if len(scene.objects) < 3:
            scene = make_scene(seed, 10**8 + 2 * index + number)
    notes = write_notes(scene, rng, course.shuffled)
    pairs = [(rng.choice(CAPTION_PROMPTS), " " + c) for c in write_captions(scene, rng)[:2]]
    if rng.random() < 0.05:
        return [], pairs[:1]  # without notes nothing but any scene can be told
    form = rng.choice(("{}", "Question: {} Answer:"))
    pairs += [(form.format(q), " " + a) for q, a in write_questions(scene, rng)]
    if rng.random() < 0.5:
        texts = rename(notes + [t for pair in pairs for t in pair], scene, rng)
        notes, texts = texts[: len(notes)], texts[len(notes) :]
        pairs = list(zip(texts[::2], texts[1::2]))
    return notes, pairs


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges make every word of the scenes one token."""
    documents = [write_document(seed, i, Course()) for i in range(1500)]
    texts = ["".join(notes) + "".join(p + a for p, a in pairs) for notes, pairs in documents]
    shapes = [*SHAPES, *MORE_SHAPES, *(plural(s) for s in SHAPES), *(s + "s" for s in MORE_SHAPES)]
    words = [*COLOURS, *MORE_COLOURS, *shapes, *SIZES, *ROWS, *COLUMNS, *NUMBERS.values(), "yes", "no", "nothing"]
    texts += [f" {w}" for w in words for _ in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=720,
        min_frequency=40,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def text_batch(tokenizer, seed: int, indices: range, course: Course) -> dict[str, Tensor]:
    """Documents as rows, all answers of one behind its notes: each sees the notes and itself, at its own positions.

    Returns:
        `input_ids` [rows, length, words], whose embeddings are to be added up over words (-1 is none), `scale` [rows,
        length], `position_ids` and `labels` [rows, length] (labels on answers alone), and `attention_mask` [rows, 1,
        length, length], 0 where a position may look.
    """
    documents = []
    for index in indices:
        notes, pairs = write_document(seed, index, course)
        answers = [(tokenizer.encode(p), tokenizer.encode(a) + [tokenizer.eos_token_id]) for p, a in pairs]
        documents.append(([tokenizer.encode(note) for note in notes], answers))
    length = max(len(notes) + sum(len(p) + len(a) for p, a in answers) for notes, answers in documents)
    ids = torch.full((len(documents), length, MOST_WORDS), -1)
    labels = torch.full((len(documents), length), -100)
    scale = torch.ones(len(documents), length)
    positions = torch.zeros_like(labels)
    segments = torch.full_like(labels, -1)  # 0 notes, 1... the answers
    for row, (notes, answers) in enumerate(documents):
        end = len(notes)
        for place, note in enumerate(notes):
            ids[row, place, : len(note)] = torch.tensor(note)
        # a soft token is as long as its maker likes
        scale[row, :end] = math.exp(random.Random(f"{seed}/scale/{indices[row]}").uniform(-0.3, 0.3))
        positions[row, :end] = torch.arange(end)
        segments[row, :end] = 0
        for number, (prompt, answer) in enumerate(answers, start=1):
            start, end = end, end + len(prompt) + len(answer)
            ids[row, start:end, 0] = torch.tensor(prompt + answer)
            labels[row, start + len(prompt) : end] = torch.tensor(answer)
            positions[row, start:end] = torch.arange(len(notes), len(notes) + end - start)
            segments[row, start:end] = number
    same = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return {
        "input_ids": ids,
        "scale": scale,
        "position_ids": positions,
        "labels": labels,
        "attention_mask": mask[:, None],
    }


def embed_words(model: LlamaForCausalLM, input_ids: Tensor, scale: Tensor) -> Tensor:
    """[rows, length, words] ids -> [rows, length, width]: embeddings added up over words, times scale."""
    embeddings = model.get_input_embeddings()(input_ids.clamp(min=0)) * (input_ids >= 0)[..., None]
    return embeddings.sum(dim=2) * scale[..., None]


def train_llm(out: Path, seed: int, steps: int, batch: int, course: Course, start: Path | None = None) -> None:
    """Train tokenizer and Llama on text and write both; from `start` go on more gently."""
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start) if start else train_tokenizer(seed)
    learning_rate = 1e-3 if start else 2e-3
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=WIDTH**-0.5,  # at 0.02 " small" and " large" drift together before they are told apart
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32) if start else LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    print(f"llm: {model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    optimizer, schedule = make_optimizer(model.parameters(), learning_rate, steps)
    started = time.process_time()
    for step in range(steps):
        texts = text_batch(tokenizer, seed, range(step * batch, (step + 1) * batch), course)
        labels = texts.pop("labels")[:, 1:]
        embeddings = embed_words(model, texts.pop("input_ids"), texts.pop("scale"))
        with torch.autocast("cpu", torch.bfloat16):
            output = model.model(inputs_embeds=embeddings, **texts, use_cache=False)
            states = output.last_hidden_state[:, :-1][labels != -100]
            loss = F.cross_entropy(model.lm_head(states).float(), labels[labels != -100])
        take_step(loss, model, optimizer, schedule)
        if step % 500 == 499:
            save_half(model, out)
            tokenizer.save_pretrained(out)
        if step % 50 == 0 or step == steps - 1:
            print(f"llm: step {step}, loss {loss.item():.4f}, {time.process_time() - started:.0f} s", flush=True)
    save_half(model, out)
    tokenizer.save_pretrained(out)


# ---------------------------------------------------------------------------------------------- image tower
def random_shade(shape: str, rng: random.Random) -> tuple[int, int, int]:
    """Any colour that is far from the one that is held out for this shape."""
    held_out = [COLOURS[c] for c, s in HELD_OUT_COMBINATIONS if s == shape]
    while True:
        rgb = tuple(rng.randrange(256) for _ in range(3))
        if all(math.dist(rgb, other) > 80 for other in held_out):
            return rgb


def vision_scene(seed: int, index: int) -> Scene:
    """A scene for the image tower: half of them crowded, and some objects in shades that have no name here.

    More objects teach more in the same time; shades without a name teach shapes apart from colours. No scene has a
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
    """What stands at each patch: [batch, patches, 6] indices of colour, shape, size, row, column (0 is nothing), and
    how many objects of the scene share its colour and shape. -100 where the colour has no name. The ground has a place
    too, so that a query can look at an empty one."""
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


HEAD_SIZES = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1, 4, 4, 4)


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Pictures as the image processor gives them: [batch, 3, side, side] from -1 to 1."""
    pictures = np.stack([np.asarray(draw_scene(s)) for s in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vision(out: Path, seed: int, steps: int, batch: int) -> None:
    """Train the image tower with one linear head on every patch, and write it without that head."""
    torch.manual_seed(seed)
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
    model.set_attn_implementation("eager")
    head = nn.Linear(WIDTH, sum(HEAD_SIZES))
    both = nn.ModuleList([model, head])
    print(f"vision: {model.num_parameters():,} parameters")
    optimizer, schedule = make_optimizer(both.parameters(), 1.5e-3, steps)
    started = time.process_time()
    for step in range(steps):
        scenes = [vision_scene(seed + 1, i) for i in range(step * batch, (step + 1) * batch)]
        with torch.autocast("cpu", torch.bfloat16):
            states = model(pixel_values=pixels_of(scenes)).last_hidden_state
        logits = head(states.float())
        targets = patch_targets(scenes)
        there = targets[..., 1] > 0
        weight = torch.where(there, 1.0, 0.25).flatten()  # most patches are ground
        loss, right = 0.0, []
        for k, part in enumerate(logits.split(HEAD_SIZES, dim=-1)):
            losses = F.cross_entropy(part.flatten(0, 1), targets[..., k].flatten(), reduction="none")
            loss = loss + (losses * weight).sum() / weight.sum()
            named = there & (targets[..., k] > 0)
            right.append((part.argmax(-1) == targets[..., k])[named].float().mean().item())
        take_step(loss, both, optimizer, schedule)
        if step % 50 == 0 or step == steps - 1:
            seconds = time.process_time() - started
            shares = ", ".join(f"{r:.3f}" for r in right)
            print(f"vision: step {step}, loss {loss.item():.4f}, right {shares}, {seconds:.0f} s", flush=True)
        if step % 500 == 499 or step == steps - 1:
            save_half(model, out)
            SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(out)


# ---------------------------------------------------------------------------------------------- both
def make_optimizer(parameters, learning_rate: float, steps: int):
    """AdamW, warmed up over 100 steps, then down a half cosine to a hundredth."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))

    def scale(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.505 + 0.495 * np.cos(np.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def take_step(loss: Tensor, model: nn.Module, optimizer, schedule) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)


def save_half(model, out: Path) -> None:
    """Write the model in float16: `config.json` says so, and loaders may widen it."""
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(out)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    print(f"{out}: {size / 1e6:.2f} MB of weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "vision", "llm"), default="all")
    parser.add_argument("--out", type=Path, required=True, help="folder for vision/ and llm/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vision-steps", type=int, default=4000)
    parser.add_argument("--llm-steps", type=int, default=4500)
    parser.add_argument("--start", type=Path, help="language model to go on from")
    parser.add_argument("--shuffled", type=float, default=0.1)
    parser.add_argument("--crowded", action="store_true")
    args = parser.parse_args()
    course = Course(args.shuffled, args.crowded)
    print(json.dumps({k: str(v) for k, v in vars(args).items()}))
    if args.part in ("all", "vision"):
        train_vision(args.out / "vision", args.seed, args.vision_steps, args.batch)
    if args.part in ("all", "llm"):
        train_llm(args.out / "llm", args.seed, args.llm_steps, args.batch // 2, course, args.start)


if __name__ == "__main__":
    main()
