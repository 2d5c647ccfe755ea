"""Training of the quickstart's language model: notes on a scene, then captions and answers about it."""

import dataclasses
import functools
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blipren.training.data.sources import grounding
from blipren.training.quickstart.clips import clip_notes, make_clip, write_clip_texts
from blipren.training.quickstart.conversation_scenes import (
    DIFFERENCES,
    LEFT,
    PAIR_QUESTIONS,
    RIGHT,
    answer_pair,
    changed_scene,
    draw_counts,
    draw_pair_kind,
    draw_scene_of,
    list_objects,
    more_pair_turns,
    write_turns,
)
from blipren.training.quickstart.glyphs import digit_notes, make_digit_picture, write_digit_texts
from blipren.training.quickstart.grounded_scenes import scene_truth
from blipren.training.quickstart.notes import (
    MORE_COLOURS,
    MORE_SHAPES,
    PLACE_BYTES,
    PLACE_WORDS,
    Note,
    place_words,
    rename_document,
    write_notes,
)
from blipren.training.quickstart.optimization import make_optimizer, save_half_precision, take_step
from blipren.training.quickstart.scenes import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, make_scene
from blipren.training.quickstart.wording import NUMBERS, plural, write_captions, write_questions

WIDTH = 128
CAPTION_PROMPTS = ("Short caption:", "Short caption:", "Short caption:", "Caption:", "Describe the image:")
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
WORDS_PER_POSITION = 6  # at most, of the notes
PLACE_NORM = 0.6  # of the first embeddings of place tokens, relative to those of words
UNSAID_NORM = 3  # the embeddings of words have norms of 0.9 to 1.6, those of tokens that no text has 5.1
LAST_DIGIT_WEIGHT = 0.1  # of the loss: the notes do not tell thousandths


@dataclasses.dataclass(frozen=True)
class Course:
    """The texts that a run of the language model is trained on."""

    shuffled: float = 0.1
    """Share of texts whose notes are in any order, since the order of queries is not known in advance."""
    crowded: bool = False
    """Most scenes have three objects, since these are the hard ones."""
    boxes: str = ""
    """Notes hold the box of their object. "find": all questions ask for boxes, and places are learned anew; "all": they are
    about boxes, points and all else."""
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
    notes = write_notes(scene, rng, course.shuffled, placed=not course.boxes or rng.random() < 0.1)
    if course.boxes == "find":
        notes = [note for note in notes if note.box]
        found = grounding.write_questions(scene_truth(scene, rng), (1, 1), ("find",))[:2]
        pairs = [(question, " " + answer) for question, answer in found]
        return rename_document(notes, pairs, rng) if rng.random() < 0.5 else (notes, pairs)
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
        second = changed_scene(first, answer, rng, "seen")
        first, second = rng.sample((first, second), 2)
    else:
        second = draw_scene_of(seed, index, numbers[1], 3)
    asked = ("different",) if kind == "different" else ("same number", "more")
    turns = [(PAIR_QUESTIONS[k], answer if k == "different" else answer_pair(k, first, second)) for k in asked]
    turns += more_pair_turns(kind, first, second)
    turns += [(f"What is on the {side}?", list_objects(s)) for side, s in (("left", first), ("right", second))]
    notes = [Note(LEFT, written=True), *write_notes(first, rng, course.shuffled)]
    notes += [Note(RIGHT, written=True), *write_notes(second, rng, course.shuffled)]
    pairs = [(" " + question, " " + answer) for question, answer in turns]
    return rename_document(notes, pairs, rng) if rng.random() < 0.5 else (notes, pairs)


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


@functools.lru_cache(maxsize=100_000)
def encode(tokenizer, text: str) -> list[int]:
    """Return the token ids of a text; notes and questions come again and again."""
    return tokenizer.encode(text)


class TextBatches(Dataset):
    """The batches of a run, one for each step: `batch` documents each, as `text_batch` makes them."""

    def __init__(self, tokenizer, seed: int, steps: int, batch: int, course: Course):
        self.tokenizer, self.seed, self.steps, self.batch, self.course = tokenizer, seed, steps, batch, course

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        indices = range(step * self.batch, (step + 1) * self.batch)
        return text_batch(self.tokenizer, self.seed, indices, self.course)


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
        answers = [(encode(tokenizer, p), [*encode(tokenizer, a), tokenizer.eos_token_id]) for p, a in pairs]
        rng = random.Random(f"{seed}/places/{index}")
        words, soft = [], []
        for note in notes:
            own = [(token, 1.0) for token in encode(tokenizer, note.text)]
            if course.boxes and note.box:
                own += place_words(tokenizer, note.box, rng)
            words += [[word] for word in own] if note.written else [own]
            soft += [not note.written] * (len(own) if note.written else 1)
        documents.append((words, soft, answers))
    length = max(len(notes) + sum(len(p) + len(a) for p, a in answers) for notes, _, answers in documents)
    ids = np.zeros((len(documents), length, WORDS_PER_POSITION + bool(course.boxes) * PLACE_WORDS), np.int64)
    weights = np.zeros(ids.shape, np.float32)
    labels = np.full((len(documents), length), -100)
    scale = np.ones(labels.shape, np.float32)
    positions = np.zeros_like(labels)
    segments = np.full_like(labels, -1)  # 0 notes, 1, 2, ... the answers
    for row, (notes, soft, answers) in enumerate(documents):
        end = len(notes)
        for place, note in enumerate(notes):
            ids[row, place, : len(note)] = [token for token, _ in note]
            weights[row, place, : len(note)] = [weight for _, weight in note]
        # the norm of a soft token varies
        scale[row, :end][soft] = math.exp(random.Random(f"{seed}/scale/{indices[row]}").uniform(-0.3, 0.3))
        positions[row, :end] = np.arange(end)
        segments[row, :end] = 0
        for number, (prompt, answer) in enumerate(answers, start=1):
            start, end = end, end + len(prompt) + len(answer)
            ids[row, start:end, 0] = prompt + answer
            weights[row, start:end, 0] = 1.0
            labels[row, start + len(prompt) : end] = answer
            positions[row, start:end] = np.arange(len(notes), len(notes) + end - start)
            segments[row, start:end] = number
    ids, weights, labels, scale, positions, segments = map(
        torch.from_numpy, (ids, weights, labels, scale, positions, segments)
    )
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


def digit_losses(logits: Tensor, labels: Tensor, digits: Tensor, third: Tensor) -> Tensor:
    """Return the loss of each label [labels] where a third digit (`third`, [labels]) counts little.

    That some digit follows counts fully: a model that may well write a comma in its place says 34 for 343.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    no_digit = logits.logsumexp(dim=1) - logits[:, digits].logsumexp(dim=1)  # negative log-probability of any digit
    return torch.where(third, no_digit + LAST_DIGIT_WEIGHT * (losses - no_digit), losses)


def third_digits(labels: Tensor, digits: Tensor) -> Tensor:
    """Return where labels [rows, length] are the third of three digits (ids `digits`)."""
    is_digit = torch.isin(labels, digits)
    third = torch.zeros_like(is_digit)
    third[:, 2:] = is_digit[:, 2:] & is_digit[:, 1:-1] & is_digit[:, :-2]
    return third


def embed_words(model: LlamaForCausalLM, input_ids: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """Return the embeddings of ids [rows, length, words], summed with weights and scaled: [rows, length, width]."""
    embeddings = model.get_input_embeddings()(input_ids) * weights[..., None]
    return embeddings.sum(dim=2) * scale[..., None]


def read_notes(model: LlamaForCausalLM, tokenizer, notes: list[Note]) -> Tensor:
    """Return notes as a perfect bridge would give them to the model: [notes, width]."""
    table, rng = model.get_input_embeddings().weight, random.Random(0)
    rows = []
    for note in notes:
        words = [(token, 1.0) for token in tokenizer.encode(note.text)]
        words += place_words(tokenizer, note.box, rng) if note.box else []
        rows.append(sum(weight * table[token] for token, weight in words))
    return torch.stack(rows).detach()


def train_llm(
    out: Path,
    seed: int,
    steps: int,
    batch: int,
    course: Course,
    start: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> None:
    """Train tokenizer and Llama on text and write both; with `start` continue from it, mostly at half the learning rate.

    Texts are written by `workers` processes beside this one, or by this one where there are none.
    """
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start) if start else train_tokenizer(seed)
    learning_rate = 1e-3 if start and course.boxes != "find" else 2e-3
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
        if course.boxes == "find":
            weight[places] = torch.randn(len(places), WIDTH) * PLACE_NORM * config.initializer_range
        if course.glyphs or (course.boxes and not continues):
            weight[digits] = torch.randn(len(digits), WIDTH) * config.initializer_range
        if course.glyphs:
            space = tokenizer.convert_tokens_to_ids("Ġ")  # the one in front of a digit
            weight[space] = torch.randn(WIDTH) * config.initializer_range
        if course.conversations:
            unsaid = (weight.norm(dim=1) > UNSAID_NORM).nonzero()[:, 0]
            weight[unsaid] = torch.randn(len(unsaid), WIDTH) * config.initializer_range
    model.set_attn_implementation("sdpa")
    model, digits = model.to(device), digits.to(device)
    print(f"llm: {model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    optimizer, schedule = make_optimizer(model.parameters(), learning_rate, steps)
    started = time.process_time()
    batches = TextBatches(tokenizer, seed, steps, batch, course)
    for step, texts in enumerate(DataLoader(batches, batch_size=None, num_workers=workers)):
        texts = {name: tensor.to(device) for name, tensor in texts.items()}
        labels = texts.pop("labels")[:, 1:]
        embeddings = embed_words(model, texts.pop("input_ids"), texts.pop("weights"), texts.pop("scale"))
        with torch.autocast(device, torch.bfloat16):
            output = model.model(inputs_embeds=embeddings, **texts, use_cache=False)
            states = output.last_hidden_state[:, :-1][labels != -100]
            logits = model.lm_head(states).float()
            if course.boxes:  # places are never said, so nothing may push them away either
                logits[:, places] = torch.finfo(torch.float32).min
            third = third_digits(labels, digits) & bool(course.boxes)
            loss = digit_losses(logits, labels[labels != -100], digits, third[labels != -100]).mean()
        take_step(loss, model, optimizer, schedule)
        if step % 500 == 499:
            save_half_precision(model, out)
            tokenizer.save_pretrained(out)
        if step % 50 == 0 or step == steps - 1:
            print(f"llm: step {step}, loss {loss.item():.4f}, {time.process_time() - started:.0f} s", flush=True)
    save_half_precision(model, out)
    tokenizer.save_pretrained(out)
