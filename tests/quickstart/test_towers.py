"""The committed towers: small, loadable, and trained on nothing that is held out."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from blipren.grounding_blipren import read_places
from blipren.training.evaluation.metrics.boxes import box_iou
from blipren.training.quickstart import train_llm, train_vision
from blipren.training.quickstart.grounded_scenes import object_box
from blipren.training.quickstart.notes import PLACE_WORDS, Note
from blipren.training.quickstart.scenes import (
    COLOURS,
    HELD_OUT_COMBINATIONS,
    SHAPES,
    draw_scene,
    held_out_reason,
    make_scene,
)
from blipren.training.quickstart.steps import TOWERS
from blipren.training.quickstart.train_llm import Course
from blipren.training.quickstart.wording import plural


def test_weights_are_at_most_two_megabytes_each():
    files = list(TOWERS.rglob("*.safetensors"))
    assert {"llm", "vision"} <= {f.parent.name for f in files}
    assert all(f.stat().st_size <= 2_000_000 for f in files)
    assert not [f for f in TOWERS.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_towers_load_as_any_other_model():
    vision = AutoModel.from_pretrained(TOWERS / "vision", dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(TOWERS / "vision")
    pixels = processor(images=draw_scene(make_scene(0, 0)), return_tensors="pt").pixel_values
    assert vision(pixel_values=pixels).last_hidden_state.shape == (1, train_vision.GRID**2, 128)
    direct = train_vision.pixels_of([make_scene(0, 0)])  # what the tower was trained on
    assert torch.allclose(pixels, direct, atol=1e-5)


def test_every_word_is_one_token():
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "llm")
    for word in (*COLOURS, *SHAPES, *(plural(s) for s in SHAPES), "left", "top", "large", "three", "yes"):
        assert len(tokenizer.encode(" " + word)) == 1, word
    assert tokenizer.decode(tokenizer.encode(" Any text, até 12!")) == " Any text, até 12!"


def test_language_model_reads_notes():
    """What it is told in front of the prompt, a held-out combination too, it says behind it."""
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "llm")
    model = AutoModelForCausalLM.from_pretrained(TOWERS / "llm", dtype=torch.float32).eval()
    for notes, prompt, expected in (
        ([" large red circle top left", " nothing", " small blue square right"], "What is the blue shape?", "square"),
        ([" large red circle top left", " nothing", " small blue square right"], "How many shapes are there?", "two"),
        ([" nothing left", " large red star top left", " nothing"], "What color is the star?", "red"),
    ):
        words = [tokenizer.encode(note) for note in notes] + [[token] for token in tokenizer.encode(prompt)]
        ids = torch.zeros(1, len(words), train_llm.WORDS_PER_POSITION, dtype=torch.long)
        weights = torch.zeros(ids.shape)
        for place, tokens in enumerate(words):
            ids[0, place, : len(tokens)] = torch.tensor(tokens)
            weights[0, place, : len(tokens)] = 1.0
        embeddings = train_llm.embed_words(model, ids, weights, torch.ones(1, len(words)))
        output = model.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=False)
        assert tokenizer.decode(output[0], skip_special_tokens=True).strip() == expected


def test_language_model_of_the_boxes_reads_places():
    """It counts what the notes name, finds nothing where there is nothing, and writes the boxes that the notes hold."""
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "boxes-llm")
    model = AutoModelForCausalLM.from_pretrained(TOWERS / "boxes-llm", dtype=torch.float32).eval()
    table = model.get_input_embeddings().weight

    def ask(notes: list[Note], prompt: str) -> str:
        given = torch.cat([train_llm.read_notes(model, tokenizer, notes), table[tokenizer.encode(prompt)]])[None]
        output = model.generate(inputs_embeds=given, max_new_tokens=32, do_sample=False)
        return tokenizer.decode(output[0], skip_special_tokens=True).strip()

    square = Note(" large red square", (0.02, 0.02, 0.3, 0.3))
    for box in ((0.7, 0.4, 0.88, 0.58), (0.4, 0.72, 0.58, 0.9), (0.07, 0.72, 0.25, 0.9)):  # no word says where
        notes = [square, Note(" small blue square", box)]
        (found,) = read_places(ask(notes, "Find every blue square.")).boxes
        assert box_iou([found], [[1000 * share for share in box]])[0, 0] > 0.5, (found, box)
    assert ask(notes, "Count every red square.") == "1"
    assert ask(notes, "Find every green cross.") == "not in the picture"


def test_a_third_digit_counts_little_but_a_comma_in_its_place_counts():
    digits, comma = torch.arange(10), 10
    labels = torch.tensor([[1, 2, 3, comma, 4, 5, comma, 6, 7, 8]])
    third = train_llm.third_digits(labels, digits)[0]
    assert third.nonzero()[:, 0].tolist() == [2, 9]
    losses = train_llm.digit_losses(torch.zeros(10, 12), labels[0], digits, third)
    assert losses[~third].tolist() == pytest.approx([math.log(12)] * 8)
    assert losses[third].tolist() == pytest.approx([math.log(12 / 10) + 0.1 * math.log(10)] * 2)


def test_towers_are_trained_on_nothing_held_out():
    for index in range(400):
        course = Course(crowded=index % 2 == 0, boxes=("", "find", "all")[index % 3], conversations=index % 2 == 1)
        notes, pairs = train_llm.write_document(0, index, course)
        text = "".join(note.text for note in notes) + " ".join(prompt + answer for prompt, answer in pairs)
        for colour, shape in HELD_OUT_COMBINATIONS:
            assert f"{colour} {shape}" not in text
            assert f"{colour} {plural(shape)}" not in text
        seen = train_vision.vision_scene(1, index)
        named = tuple(o for o in seen.objects if o.colour in COLOURS)
        assert held_out_reason(replace(seen, objects=named)) is None
        for o in seen.objects:  # nor a shade that comes near a held-out colour of that shape
            for colour, shape in HELD_OUT_COMBINATIONS:
                assert o.shape != shape or math.dist(o.rgb, COLOURS[colour]) > 60


def test_answers_of_a_document_do_not_see_each_other():
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "llm")
    model = AutoModelForCausalLM.from_pretrained(TOWERS / "llm", dtype=torch.float32).eval()
    batch = train_llm.text_batch(tokenizer, 0, range(3), Course())
    labels, ids, weights, scale = (batch.pop(name) for name in ("labels", "input_ids", "weights", "scale"))
    embeddings = train_llm.embed_words(model, ids, weights, scale)
    with torch.no_grad():
        together = model(inputs_embeds=embeddings, **batch).logits
        for row in range(3):
            notes, pairs = train_llm.write_document(0, row, Course())
            end = len(notes)
            for prompt, answer in pairs:
                start, end = end, end + len(tokenizer.encode(prompt)) + len(tokenizer.encode(answer)) + 1
                alone = torch.cat([embeddings[row, : len(notes)], embeddings[row, start:end]])[None]
                logits = model(inputs_embeds=alone).logits[0, len(notes) :]
                torch.testing.assert_close(together[row, start:end], logits, atol=1e-4, rtol=1e-4)
                assert labels[row, end - 1] == tokenizer.eos_token_id
            assert (labels[row, end:] == -100).all()


def test_patch_targets_tell_what_stands_where():
    scene = next(s for s in (make_scene(0, i) for i in range(99)) if len(s.objects) == 1)
    (o,) = scene.objects
    side = train_vision.GRID
    targets = train_vision.patch_targets([scene])[0].view(side, side, 6)
    here = targets[int(o.y * side), int(o.x * side)].tolist()
    assert here == [
        list(COLOURS).index(o.colour) + 1,
        SHAPES.index(o.shape) + 1,
        ["small", "large"].index(o.size) + 1,
        o.row + 1,
        o.column + 1,
        1,
    ]
    row, column = (0 if o.row else side - 1), (0 if o.column else side - 1)  # the corner far away is ground
    assert targets[row, column].tolist() == [0, 0, 0, 1 if o.row else 3, 1 if o.column else 3, 0]


def test_box_targets_are_the_boxes_of_the_objects():
    scenes = [train_vision.vision_scene(0, i) for i in range(6)]
    targets = train_vision.patch_targets(scenes)
    places = train_vision.box_targets(scenes, targets)
    assert not places[targets[..., 1] == 0].any()
    for scene, own in zip(scenes, places):
        for o in scene.objects:
            here = own[int(o.y * train_vision.GRID) * train_vision.GRID + int(o.x * train_vision.GRID)]
            assert ((here[:: PLACE_WORDS // 4] + 1) / 2).tolist() == pytest.approx(object_box(o), abs=1e-6)


def test_training_of_the_towers_runs(tmp_path):
    train_vision.train_vision(tmp_path / "vision", seed=0, steps=2, batch=2, boxes=True)
    train_llm.train_llm(tmp_path / "llm", seed=0, steps=2, batch=2, course=Course())
    assert AutoModel.from_pretrained(tmp_path / "vision", dtype="auto").dtype == torch.float16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype="auto").dtype == torch.float16
    committed, fresh = (Path(p) / "llm" / "tokenizer.json" for p in (TOWERS, tmp_path))
    assert committed.read_text() == fresh.read_text()


def test_unknown_shape_cannot_be_drawn():
    scene = make_scene(0, 0)
    broken = replace(scene, objects=(replace(scene.objects[0], shape="banana"),))
    with pytest.raises(ValueError, match="banana"):
        draw_scene(broken)
