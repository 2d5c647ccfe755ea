"""Training of the quickstart's language model: notes on a scene, then captions and answers about it."""

import dataclasses
import math
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blipren.training.data.sources import grounding
from blipren.training.quickstart.clips import clip_notes, make_clip, write_clip_texts
from blipren.training.quickstart.conversation_scenes import (
    DIFFERENCES,
    LEFT,
    PAIR_QUESTIONS,
    RIGHT,
    answer_pair,
    change_scene,
    draw_counts,
    draw_pair_kind,
    draw_scene_of,
    more_pair_turns,
    write_turns,
)
from blipren.training.quickstart.glyphs import digit_notes, make_digit_picture, write_digit_texts
from blipren.training.quickstart.grounded_scenes import object_box, scene_truth
from blipren.training.quickstart.optimization import make_optimizer, save_half_precision, take_step
from blipren.training.quickstart.scenes import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene, make_scene
from blipren.training.quickstart.wording import NUMBERS, place_answer, plural, write_captions, write_questions

WIDTH = 128
CAPTION_PROMPTS = ("Short caption:", "Short caption:", "Short caption:", "Caption:", "Describe the image:")
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
WORDS_PER_POSITION = 6  # at most, of the notes
PLACE_WORDS = 8  # of a box: two tokens for each of its numbers
PLACE_STEPS = 20  # of a side
PLACE_BYTES = [chr(byte) for byte in (*range(161, 173), *range(174, 246))]  # tokens of no text
PLACE_WAVES = 6
PLACE_NOISE = 0.006  # shares of the side; a soft token is not exact either
UNSAID_NORM = 3  # the embeddings of words have norms of 0.9 to 1.6, those of tokens that no text has 5.1
LAST_DIGIT_WEIGHT = 0.1  # of the loss: the notes do not tell thousandths

# Colours and shapes that no scene has: texts about them teach that any colour goes with any shape.
MORE_COLOURS = tuple(
    "pink brown gray cyan golden silver beige teal maroon navy olive violet indigo crimson ivory bronze".split()
)
MORE_SHAPES = tuple("heart ring arrow hexagon moon cube cone leaf cloud bell key lamp boat tree house fish".split())


class Note(NamedTuple):
    """What one position before the prompt holds: words, and the box of an object as shares of the side.

    A `written` note is text as a prompt is: it takes a position for each token.
    """

    text: str
    box: tuple[float, ...] | None = None
    written: bool = False


class Cell(NamedTuple):
    """A place without an object."""

    row: int
    column: int


EMPTY_CELLS = [Cell(row, column) for row in range(3) for column in range(3)]


def write_notes(scene: Scene, rng: random.Random, shuffled: float, placed: bool = True) -> list[Note]:
    """Return notes on a scene, one for each position before the prompt.

    The embeddings of the words of a position are summed. Each object is one position, " large red circle top left", as a
    soft token stands for an object or a region. The positions are mostly in reading order; some objects come twice, and
    some positions say that a place is empty, " nothing bottom".

    Args:
        shuffled: share of the scenes whose objects are in any order.
        placed: whether words say where an object is, beside its box.
    """
    objects = list(scene.objects)
    if rng.random() < shuffled:
        rng.shuffle(objects)
    most = rng.choice((1, 1, 1, 2))
    notes = []
    for o in objects:
        place = f" {place_answer(o)}" if placed else ""
        notes += [Note(f" {o.size} {o.colour} {o.shape}{place}", object_box(o))] * rng.randint(1, most)
    taken = {(o.row, o.column) for o in objects}
    free = [f" {place_answer(cell)}" for cell in EMPTY_CELLS if (cell.row, cell.column) not in taken]
    for _ in range(rng.randrange(17 - len(notes))):
        notes.insert(rng.randint(0, len(notes)), Note(rng.choice((" nothing", " nothing" + rng.choice(free)))))
    return notes


def place_words(tokenizer, box: tuple[float, ...], rng: random.Random) -> list[tuple[int, float]]:
    """Return tokens and weights whose weighted embeddings say where a box is, to about a hundredth of the side.

    Each of x1, y1, x2, y2 has 21 tokens that no text uses, for 0, 0.05, ..., 1. A number is the mean of the two around it,
    weighted by nearness, since a soft token can mix embeddings but not write digits.
    """
    words = []
    for axis, share in enumerate(box):
        place = min(PLACE_STEPS, max(0, PLACE_STEPS * (share + rng.gauss(0, PLACE_NOISE))))
        low = min(PLACE_STEPS - 1, int(place))
        for step, weight in ((low, low + 1 - place), (low + 1, place - low)):
            token = PLACE_BYTES[(PLACE_STEPS + 1) * axis + step]
            words.append((tokenizer.convert_tokens_to_ids(token), weight))
    return words


def place_embeddings(width: int) -> Tensor:
    """Return first embeddings of the tokens of `PLACE_BYTES`: [tokens, width], each about as long as a word's.

    Those of a number lie on a smooth random curve, so that neighbours are alike: what is learned of 0.4 holds for 0.45, and
    a projector can follow the curve.
    """
    angles = math.pi * torch.linspace(0, 1, PLACE_STEPS + 1)[:, None] * torch.arange(1, PLACE_WAVES + 1)
    curve = torch.cat([angles.cos(), angles.sin()], dim=1) / PLACE_WAVES**0.5
    return (curve @ torch.randn(4, 2 * PLACE_WAVES, width) * width**-0.5).flatten(0, 1)


def rename(texts: list[str], rng: random.Random) -> list[str]:
    """Return the texts with some colours and shapes replaced by ones that no scene has."""
    share = rng.random()
    swaps = {c: n for c, n in zip(COLOURS, rng.sample(MORE_COLOURS, len(COLOURS))) if rng.random() < share}
    swaps |= {s: n for s, n in zip(SHAPES, rng.sample(MORE_SHAPES, len(SHAPES))) if rng.random() < share}
    swaps |= {plural(s): n + "s" for s, n in swaps.items() if s in SHAPES}
    pattern = re.compile(rf"\b({'|'.join(swaps)})\b")
    texts = [pattern.sub(lambda m: swaps[m[1]], t) for t in texts] if swaps else texts
    return [re.sub(r"\ban? (?=(\w))", lambda m: "an " if m[1] in "aeiou" else "a ", t) for t in texts]


@dataclasses.dataclass(frozen=True)
class Course:
    """The texts that a run of the language model is trained on."""

    shuffled: float = 0.1
    """Share of texts whose notes are in any order, since the order of queries is not known in advance."""
    crowded: bool = False
    """Most scenes have three objects, since these are the hard ones."""
    boxes: bool = False
    """Notes hold the box of their object, and there are questions about boxes and points."""
    glyphs: bool = False
    """Four of five texts are about small digits, or about clips."""
    conversations: bool = False
    """Three of four texts are about two scenes, one of eight is a conversation of several turns."""


def write_document(seed: int, index: int, course: Course) -> tuple[list[Note], list[tuple[str, str]]]:
    """Return one training text: notes on a scene, one a position, and prompts with answers about it."""
    rng = random.Random(f"{seed}/text/{index}")
    if course.glyphs and index % 5:
        return write_glyph_document(seed, index, rng)
    if course.conversations and index % 8 < 6:
        return write_pair_document(seed, index, rng, course)
    scene = make_scene(seed, index)
    for number in range(2 if course.crowded else 0):
        if len(scene.objects) < 3:
            scene = make_scene(seed, 10**8 + 2 * index + number)
    # most notes leave out the words that say nearly where a thing is, since they are no box
    notes = write_notes(scene, rng, course.shuffled, placed=not course.boxes or rng.random() < 0.3)
    pairs = [(rng.choice(CAPTION_PROMPTS), " " + c) for c in write_captions(scene, rng)[:2]]
    if rng.random() < 0.05:
        return [], pairs[:1]  # without notes no question has an answer
    form = rng.choice(("{}", "Question: {} Answer:"))
    questions = write_questions(scene, rng)
    if course.boxes:
        about_boxes = grounding.write_questions(scene_truth(scene, rng, absent=2), (1, 1), grounding.KINDS)
        pairs = pairs[:1]
        questions = rng.sample(questions, 2) + rng.sample(about_boxes, 5)
    pairs += [(form.format(q), " " + a) for q, a in questions]
    if course.conversations and index % 8 == 6:
        turns = write_turns(scene, rng, False)
        pairs = [("".join(f"{q} {a}{EOS}" for q, a in turns[:k]) + q, " " + a) for k, (q, a) in enumerate(turns)]
    return rename_document(notes, pairs, rng) if rng.random() < 0.5 else (notes, pairs)


def write_pair_document(
    seed: int, index: int, rng: random.Random, course: Course
) -> tuple[list[Note], list[tuple[str, str]]]:
    """Return a text about two scenes: their notes behind "Left picture:" and "Right picture:", questions, answers."""
    kind = draw_pair_kind(rng)
    numbers = (1, 2, 3, 3) if kind == "different" else draw_counts(kind, rng)
    first = draw_scene_of(seed, index, rng.choice(numbers) if kind == "different" else numbers[0], 2)
    if kind == "different":
        answer = rng.choice(DIFFERENCES)
        second = change_scene(first, answer, rng)
        first, second = rng.sample((first, second), 2)
    else:
        second = draw_scene_of(seed, index, numbers[1], 3)
    asked = ("different",) if kind == "different" else ("same number", "more")
    turns = [(PAIR_QUESTIONS[k], answer if k == "different" else answer_pair(k, first, second)) for k in asked]
    turns += more_pair_turns(kind, first, second)
    notes = [Note(LEFT, written=True), *write_notes(first, rng, course.shuffled)]
    notes += [Note(RIGHT, written=True), *write_notes(second, rng, course.shuffled)]
    pairs = [(" " + question, " " + answer) for question, answer in turns]
    return rename_document(notes, pairs, rng) if rng.random() < 0.5 else (notes, pairs)


def rename_document(
    notes: list[Note], pairs: list[tuple[str, str]], rng: random.Random
) -> tuple[list[Note], list[tuple[str, str]]]:
    """Return notes and pairs with some colours and shapes replaced by ones that no scene has, the same ones in all."""
    texts = rename([note.text for note in notes] + [t for pair in pairs for t in pair], rng)
    notes = [note._replace(text=text) for note, text in zip(notes, texts)]
    texts = texts[len(notes) :]
    return notes, list(zip(texts[::2], texts[1::2]))


def write_glyph_document(seed: int, index: int, rng: random.Random) -> tuple[list[Note], list[tuple[str, str]]]:
    """Return a text about a picture of small digits or a clip: notes in any order, prompts with answers."""
    if index % 2:
        picture = make_digit_picture(seed, index)
        notes, (caption, questions) = digit_notes(picture), write_digit_texts(picture)
    else:
        clip = make_clip(seed, index // 2)
        notes, (caption, questions) = clip_notes(clip), write_clip_texts(clip)
    notes = [note for note in notes for _ in range(rng.choice((1, 1, 2)))]
    notes += [" nothing"] * rng.randrange(17 - len(notes))
    rng.shuffle(notes)
    form = rng.choice(("{}", "Question: {} Answer:"))
    pairs = [(rng.choice(CAPTION_PROMPTS), " " + caption)] + [(form.format(q), " " + a) for q, a in questions]
    return [Note(note) for note in notes], pairs


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word of the scenes is one token."""
    documents = [write_document(seed, i, Course()) for i in range(1500)]
    texts = ["".join(note.text for note in notes) + "".join(p + a for p, a in pairs) for notes, pairs in documents]
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


def text_batch(tokenizer, seed: int, indices: Sequence[int], course: Course) -> dict[str, Tensor]:
    """Return a batch with one document a row: its notes, then all of its answers. Each answer attends to the notes and
    to itself, at positions that continue the notes.

    Returns:
        `input_ids` [rows, length, words], whose embeddings are summed over words with `weights` (0 is none), `scale` [rows,
        length], `position_ids` and `labels` [rows, length] (labels on answers only), and `attention_mask` [rows, 1, length,
        length], 0 where a position may attend.
    """
    documents = []
    for index in indices:
        notes, pairs = write_document(seed, index, course)
        answers = [(tokenizer.encode(p), tokenizer.encode(a) + [tokenizer.eos_token_id]) for p, a in pairs]
        rng = random.Random(f"{seed}/places/{index}")
        words, soft = [], []
        for note in notes:
            own = [(token, 1.0) for token in tokenizer.encode(note.text)]
            if course.boxes and note.box:
                own += place_words(tokenizer, note.box, rng)
            words += [[word] for word in own] if note.written else [own]
            soft += [not note.written] * (len(own) if note.written else 1)
        documents.append((words, soft, answers))
    length = max(len(notes) + sum(len(p) + len(a) for p, a in answers) for notes, _, answers in documents)
    ids = torch.zeros(len(documents), length, WORDS_PER_POSITION + course.boxes * PLACE_WORDS, dtype=torch.long)
    weights = torch.zeros(ids.shape)
    labels = torch.full((len(documents), length), -100)
    scale = torch.ones(len(documents), length)
    positions = torch.zeros_like(labels)
    segments = torch.full_like(labels, -1)  # 0 notes, 1, 2, ... the answers
    for row, (notes, soft, answers) in enumerate(documents):
        end = len(notes)
        for place, note in enumerate(notes):
            ids[row, place, : len(note)] = torch.tensor([token for token, _ in note])
            weights[row, place, : len(note)] = torch.tensor([weight for _, weight in note])
        # the norm of a soft token varies
        scale[row, :end][torch.tensor(soft, dtype=torch.bool)] = math.exp(
            random.Random(f"{seed}/scale/{indices[row]}").uniform(-0.3, 0.3)
        )
        positions[row, :end] = torch.arange(end)
        segments[row, :end] = 0
        for number, (prompt, answer) in enumerate(answers, start=1):
            start, end = end, end + len(prompt) + len(answer)
            ids[row, start:end, 0] = torch.tensor(prompt + answer)
            weights[row, start:end, 0] = 1.0
            labels[row, start + len(prompt) : end] = torch.tensor(answer)
            positions[row, start:end] = torch.arange(len(notes), len(notes) + end - start)
            segments[row, start:end] = number
    same = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return {
        "input_ids": ids,
        "weights": weights,
        "scale": scale,
        "position_ids": positions,
        "labels": labels,
        "attention_mask": mask[:, None],
    }


def label_weights(labels: Tensor, digits: Tensor) -> Tensor:
    """Return the weight of each label [rows, length] in the loss: less for the third of three digits (ids `digits`)."""
    is_digit = torch.isin(labels, digits)
    third = is_digit[:, 2:] & is_digit[:, 1:-1] & is_digit[:, :-2]
    weights = torch.ones(labels.shape)
    weights[:, 2:][third] = LAST_DIGIT_WEIGHT
    return weights


def embed_words(model: LlamaForCausalLM, input_ids: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """Return the embeddings of ids [rows, length, words], summed with weights and scaled: [rows, length, width]."""
    embeddings = model.get_input_embeddings()(input_ids) * weights[..., None]
    return embeddings.sum(dim=2) * scale[..., None]


def train_llm(out: Path, seed: int, steps: int, batch: int, course: Course, start: Path | None = None) -> None:
    """Train tokenizer and Llama on text and write both; with `start` continue from it at half the learning rate."""
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
        initializer_range=WIDTH
        ** -0.5,  # with 0.02 " small" and " large" become the same before the model distinguishes them
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32) if start else LlamaForCausalLM(config)
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    places = tokenizer.convert_tokens_to_ids(PLACE_BYTES) if course.boxes else []
    with torch.no_grad():  # tokens that were never said have grown into one large vector, which would drown the words
        weight = model.get_input_embeddings().weight
        continues = F.cosine_similarity(weight[digits][:1], weight[digits]).min() < 0.9  # they have been said
        if course.boxes and not continues:
            weight[places] = place_embeddings(WIDTH)
        if course.glyphs or (course.boxes and not continues):
            weight[digits] = torch.randn(len(digits), WIDTH) * config.initializer_range
        if course.glyphs:
            space = tokenizer.convert_tokens_to_ids("Ġ")  # the one in front of a digit
            weight[space] = torch.randn(WIDTH) * config.initializer_range
        if course.conversations:
            unsaid = (weight.norm(dim=1) > UNSAID_NORM).nonzero()[:, 0]
            weight[unsaid] = torch.randn(len(unsaid), WIDTH) * config.initializer_range
    model.set_attn_implementation("sdpa")
    print(f"llm: {model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    optimizer, schedule = make_optimizer(model.parameters(), learning_rate, steps)
    started = time.process_time()
    for step in range(steps):
        texts = text_batch(tokenizer, seed, range(step * batch, (step + 1) * batch), course)
        labels = texts.pop("labels")[:, 1:]
        embeddings = embed_words(model, texts.pop("input_ids"), texts.pop("weights"), texts.pop("scale"))
        with torch.autocast("cpu", torch.bfloat16):
            output = model.model(inputs_embeds=embeddings, **texts, use_cache=False)
            states = output.last_hidden_state[:, :-1][labels != -100]
            logits = model.lm_head(states).float()
            if course.boxes:  # places are never said, so nothing may push them away either
                logits[:, places] = torch.finfo(torch.float32).min
            losses = F.cross_entropy(logits, labels[labels != -100], reduction="none")
            weights = label_weights(labels, digits)[labels != -100]
            loss = (losses * weights).sum() / weights.sum() if course.boxes else losses.mean()
        take_step(loss, model, optimizer, schedule)
        if step % 500 == 499:
            save_half_precision(model, out)
            tokenizer.save_pretrained(out)
        if step % 50 == 0 or step == steps - 1:
            print(f"llm: step {step}, loss {loss.item():.4f}, {time.process_time() - started:.0f} s", flush=True)
    save_half_precision(model, out)
    tokenizer.save_pretrained(out)
