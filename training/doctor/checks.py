"""The checks of `blipren doctor`: that a checkpoint's parts work together, before a training step is paid for.

A check is a function of the model under test. It returns what it measured, or raises `CheckFailure` with the reason.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import set_seed

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.doctor import DoctorSettings
from blipren.training.data.cache.encoder import PIXEL_INPUTS
from blipren.training.errors import one_line
from blipren.training.evaluation.features import encode_images
from blipren.training.evaluation.image_parts import exchange_parts
from blipren.video_blipren import VideoFrames

SHUFFLED_LOSS_RATIO = 1.5  # the loss of overfitted images must grow that much when they are exchanged
IGNORED_PART = 1e-10  # share of the visual tokens; rounding in double precision stays below it
LEARNED_LOSS = 0.5  # nats per token; below it the eight images count as overfitted


class CheckFailure(Exception):
    """A check failed: what was found, and what to do."""


@dataclass
class ModelUnderTest:
    """A checkpoint with what the checks share: eight drawn images with their captions."""

    model: BliprenForConditionalGeneration
    processor: BliprenProcessor
    settings: DoctorSettings
    images: list[Image.Image]
    captions: list[str]

    def batch(self) -> dict[str, torch.Tensor]:
        """Return the eight images and their captions as one left-padded batch."""
        inputs = self.processor(images=[[image] for image in self.images], return_tensors="pt")
        counts = [int(n) for n in (inputs["input_ids"] == self.processor.image_token_id).sum(1)]
        rows = [
            (self.processor.encode_prompt(num_visual_tokens=[n]), self.processor.encode_answer(caption))
            for n, caption in zip(counts, self.captions)
        ]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        pad = self.processor.tokenizer.pad_token_id
        ids, mask, labels = [], [], []
        for prompt, answer in rows:
            gap = length - len(prompt) - len(answer)
            ids.append([pad] * gap + prompt + answer)
            mask.append([0] * gap + [1] * (length - gap))
            labels.append([-100] * (gap + len(prompt)) + answer)
        inputs.update(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels))
        return {key: value.to(self.model.device) for key, value in inputs.items()}


def draw_test_images(seed: int) -> tuple[list[Image.Image], list[str]]:
    """Return eight images that differ in colour, shape and place, and their captions."""
    colours = ["red", "green", "blue", "yellow", "white", "black", "purple", "orange"]
    shapes = ["circle", "square"] * 4
    images = []
    for index, (colour, shape) in enumerate(zip(colours, shapes)):
        noise = np.random.default_rng([seed, index]).integers(96, 160, (96, 96, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((224, 224))
        draw = ImageDraw.Draw(image)
        left, top = 20 + 12 * index, 116 - 12 * index
        box = (left, top, left + 88, top + 88)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        images.append(image)
    # plain words: a small frozen language model cannot be made to say words that it never read
    return images, [
        f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" for colour, shape in zip(colours, shapes)
    ]


def check_dimensions(test: ModelUnderTest) -> str:
    """An image gives as many features of the LLM's width as the prompt has placeholders."""
    model, processor = test.model, test.processor
    inputs = processor(images=test.images[0], return_tensors="pt")
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    pixels = {k: v.to(model.device) for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    features = model.get_image_features(**pixels).pooler_output[0]
    width = model.get_input_embeddings().weight.shape[1]
    if features.shape != (placeholders, width):
        raise CheckFailure(
            f"an image gives {features.shape[0]} features of width {features.shape[1]}, the prompt has {placeholders} "
            f"placeholders and the language model is {width} wide; the processor is of another checkpoint"
        )
    if not torch.isfinite(features).all():
        raise CheckFailure("image features are not finite: the vision encoder's weights or precision are broken")
    patches = model.encode_images(**pixels).shape[1]
    return f"{patches} patches -> {placeholders} visual tokens of width {width}"


def check_end_of_sequence(test: ModelUnderTest) -> str:
    """Every answer ends in one labelled EOS, at which generation stops; padding has no label."""
    processor, model = test.processor, test.model
    end, pad = processor.answer_end_id, processor.tokenizer.pad_token_id
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    if end is None or end not in stops:
        raise CheckFailure(
            f"answers end in {processor.answer_end!r} ({end}), but generation stops at {stops}: captions would never "
            "stop; set generation_config.eos_token_id"
        )
    if pad is None:
        raise CheckFailure("the tokenizer has no padding token; set tokenizer.pad_token")
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if max(end, pad) >= vocabulary:
        raise CheckFailure(f"EOS {end} or padding {pad} is outside the language model's vocabulary of {vocabulary}")
    batch = test.batch()
    for row, mask, ids in zip(batch["labels"], batch["attention_mask"], batch["input_ids"]):
        labelled = row[row != -100].tolist()
        if labelled.count(end) != 1 or labelled[-1] != end:
            raise CheckFailure(f"labels hold {labelled.count(end)} end tokens instead of one at the end: {labelled}")
        if bool(((row != -100) & (mask == 0)).any()) or bool(
            ((row != -100) & (ids == processor.image_token_id)).any()
        ):
            raise CheckFailure("padding or image tokens are in the labels")
    return f"EOS {processor.answer_end!r} ({end}) once in every label row; padding {pad} in none"


def check_prompt(test: ModelUnderTest) -> str:
    """Training and inference use the same prompt tokens, and no prompt ends in a space."""
    processor = test.processor
    for prompt in [None, *processor.prompts, "What colour is it?"]:
        inference = processor(images=test.images[0], text=prompt, return_tensors="pt")["input_ids"][0].tolist()
        count = inference.count(processor.image_token_id)
        training = processor.encode_prompt(prompt, num_visual_tokens=[count])
        if inference != training:
            raise CheckFailure(f"prompt {prompt!r} is {training} in training and {inference} in inference")
        if processor.prompt_text(prompt).endswith(" "):
            raise CheckFailure(f"prompt {prompt!r} ends in a space: no word could follow it as in training")
    return (
        f"{len(processor.prompts) + 2} prompts, the same tokens in training and inference: {processor.prompt_text()!r}"
    )


def check_gradients(test: ModelUnderTest) -> str:
    """Gradients reach every part of the connector and nothing frozen."""
    model = test.model
    model.train()
    model.zero_grad(set_to_none=True)
    model(**test.batch()).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    modules_in_training = [
        name for name, part in model.parts().items() if name in ("vision", "second_vision", "llm") and part.training
    ]
    model.zero_grad(set_to_none=True)
    model.eval()
    if not trained:
        raise CheckFailure("nothing is trained: every parameter is frozen")
    connector = {name.split(".")[1] for name in trained if name.startswith(("model.qformer.", "model.projector."))}
    for part in connector:
        if not any(name.startswith(f"model.{part}.") for name in reached):
            raise CheckFailure(f"no gradient reaches the {part}: the loss does not depend on it")
    if frozen:
        raise CheckFailure(f"{len(frozen)} frozen parameters got a gradient, such as {frozen[0]}")
    trainable_parts = {name.split(".")[1] for name in trained}
    if wrong := [name for name in modules_in_training if name not in trainable_parts]:
        raise CheckFailure(f"{wrong[0]} is frozen but not in eval mode: its dropout would be active")
    return f"{len(reached)} of {len(trained)} trained parameters reached, no frozen one"


def check_batch_equals_single(test: ModelUnderTest) -> str:
    """A left-padded batch generates what single prompts do, and its loss is that of its rows."""
    model, processor = test.model, test.processor
    prompts = [None, "What is the colour of the shape in this picture?"]
    texts = [processor.prompts[0], prompts[1]]
    together = processor(images=[[i] for i in test.images[:2]], text=texts, return_tensors="pt").to(model.device)
    own = {"max_new_tokens": 8, "do_sample": False, "use_memory": False, "use_reranker": False}
    with torch.inference_mode():
        batch = model.generate(**together, **own)[:, together["input_ids"].shape[1] :]
        for row, image, text in zip(batch.tolist(), test.images, texts):
            alone = processor(images=image, text=text, return_tensors="pt").to(model.device)
            single = model.generate(**alone, **own)[0, alone["input_ids"].shape[1] :]
            single = single.tolist()
            if row[: len(single)] != single:
                raise CheckFailure(
                    f"in a padded batch the model says {processor.tokenizer.decode(row)!r}, alone "
                    f"{processor.tokenizer.decode(single)!r}: the language model does not honour the attention mask"
                )
    return "a left-padded batch generates the tokens of single prompts"


def check_reload(test: ModelUnderTest) -> str:
    """Saving and loading gives equal logits."""
    model = test.model
    batch = test.batch()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        test.processor.save_pretrained(folder)
        again = BliprenForConditionalGeneration.from_pretrained(folder).to(model.device)
        difference = (model(**batch).logits - again(**batch).logits).abs().max().item()
        if BliprenProcessor.from_pretrained(folder).encode_prompt() != test.processor.encode_prompt():
            raise CheckFailure("the saved processor encodes the prompt otherwise than this one")
    if difference != 0:
        raise CheckFailure(
            f"a saved and loaded copy differs by {difference:.2e} in its logits: weights were lost or rounded"
        )
    return "a saved and loaded copy gives equal logits"


def check_sees_image(test: ModelUnderTest) -> str:
    """After overfitting eight images, exchanging them makes the loss at least 1.5 times as large."""
    state = copy.deepcopy({k: v for k, v in test.model.state_dict().items() if k.startswith(("model.q", "model.p"))})
    model, settings = test.model, test.settings
    set_seed(settings.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    images = test.batch()
    with torch.no_grad():
        pixels = {k: v for k, v in images.items() if k in PIXEL_INPUTS}
        patch_features = model.encode_images(**pixels)
    texts = {k: images[k] for k in ("input_ids", "attention_mask", "labels")}
    mask = pixels.get("pixel_attention_mask")

    def loss_with(order: list[int]) -> torch.Tensor:
        return model(
            **texts,
            patch_features=patch_features[order],
            patch_attention_mask=mask[order] if mask is not None else None,
            label_logits_only=True,
        ).loss

    right = list(range(len(test.images)))
    shuffled = right[1:] + right[:1]
    loss = ratio = 0.0
    steps = 0
    for step in range(1, settings.steps + 1):
        steps = step
        model.eval()  # without dropout eight images are learned in fewer steps
        optimizer.zero_grad(set_to_none=True)
        value = loss_with(right)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 10 == 0:
            with torch.inference_mode():
                loss = loss_with(right).item()
                ratio = loss_with(shuffled).item() / max(loss, 1e-9)
            if loss < LEARNED_LOSS and ratio >= SHUFFLED_LOSS_RATIO:
                break
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state, strict=False)
    if ratio < SHUFFLED_LOSS_RATIO:
        raise CheckFailure(
            f"after {steps} steps on eight images the loss is {loss:.3f}, with the images exchanged {ratio:.2f} times "
            f"that (at least {SHUFFLED_LOSS_RATIO} is needed): the model ignores its image, or --steps is too small"
        )
    return f"{steps} steps on eight images: loss {loss:.3f}, with the images exchanged {ratio:.1f} times that"


def check_parts(test: ModelUnderTest) -> str:
    """Exchanging the higher resolutions, the second encoder's features or the order of frames changes visual tokens."""
    model, processor = test.model, test.processor
    images = test.images
    if model.config.num_frames is not None:
        count = model.config.num_frames
        images = [
            VideoFrames([test.images[(i + k) % len(test.images)] for k in range(count)], seconds=count)
            for i in range(len(test.images))
        ]
    features = encode_images(model, processor, images)
    others = [(i + 1) % len(images) for i in range(len(images))]
    changes = {}
    modules = [model.parts()[part].double() for part in ("qformer", "projector") if part in model.parts()]
    try:  # in double precision, where rounding is far below what an untrained connector makes of an exchange

        @torch.no_grad()
        def visual_tokens(given):
            return torch.cat(model.get_image_features(**given.model_inputs(model.device)).pooler_output)

        right = visual_tokens(features)
        for part, exchanged in exchange_parts(model.config, features, others, test.settings.seed).items():
            found = visual_tokens(exchanged)
            changes[part] = float((found - right).norm() / right.norm()) if found.shape == right.shape else 1.0
    finally:
        for module in modules:
            module.float()
    for part, change in changes.items():
        if change < IGNORED_PART:
            raise CheckFailure(f"exchanging {part} changes the visual tokens by {change:.1e} of them: it is not read")
    if not changes:
        return "one scale, one encoder, no frames"
    return "; ".join(f"exchanging {part} changes the visual tokens by {100 * c:.2g}%" for part, c in changes.items())


def check_two_images(test: ModelUnderTest) -> str:
    """Exchanging one image of two in a prompt changes the loss, whichever of them it is."""
    model, answer = test.model, test.processor.encode_answer(test.captions[0])

    @torch.no_grad()
    def loss_with(first: int, second: int) -> float:
        inputs = test.processor(images=[[test.images[first], test.images[second]]], return_tensors="pt")
        ids = [*inputs["input_ids"][0].tolist(), *answer]
        labels = [-100] * (len(ids) - len(answer)) + answer
        inputs.update(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), labels=torch.tensor([labels])
        )
        return model(**{key: value.to(model.device) for key, value in inputs.items()}).loss.item()

    right = loss_with(0, 1)
    changes = {"first": loss_with(2, 1) - right, "second": loss_with(0, 2) - right}
    for place, change in changes.items():
        if change == 0:
            raise CheckFailure(f"exchanging the {place} of two images does not change the loss: it is not read")
    return "; ".join(f"exchanging the {place} changes the loss by {change:+.1e}" for place, change in changes.items())


CHECKS: dict[str, Callable[[ModelUnderTest], str]] = {
    "dimensions fit": check_dimensions,
    "end of sequence": check_end_of_sequence,
    "prompt tokens": check_prompt,
    "gradients": check_gradients,
    "batch equals single": check_batch_equals_single,
    "save and load": check_reload,
    "parts of the image": check_parts,
    "two images": check_two_images,
    "sees the image": check_sees_image,
}


class CheckResult(NamedTuple):
    """Outcome of a check; `text` is what it measured, or why it failed."""

    name: str
    passed: bool
    text: str


def run_checks(test: ModelUnderTest) -> list[CheckResult]:
    """Run every check and print a line per check."""
    results = []
    for name, check in CHECKS.items():
        try:
            result = CheckResult(name, True, check(test))
        except CheckFailure as failure:
            result = CheckResult(name, False, str(failure))
        except (ValueError, RuntimeError, IndexError) as error:  # the model itself refused what the check asked
            result = CheckResult(name, False, f"{type(error).__name__}: {one_line(error, 300)}")
        print(f"{'ok  ' if result.passed else 'FAIL'} {name:<20} {result.text}", flush=True)
        results.append(result)
    return results
