"""`blipren doctor`: proves that a checkpoint's parts work together, a line a proof, before a training step is paid for.

Each check is a function of the patient that returns what it measured, or raises `Illness` with the reason.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import set_seed

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.doctor import DoctorSettings
from blipren.training.engine.loading import load_checkpoint
from blipren.training.errors import UserError

SHUFFLED_LOSS_RATIO = 1.5  # how much worse eight overfitted images must get when they are exchanged
LEARNED_LOSS = 0.5  # nats a token; below it the eight images count as overfitted


class Illness(Exception):
    """A proof that failed: what was found, and what to do."""


@dataclass
class Patient:
    """A checkpoint with what the checks share: eight drawn images, their captions, one batch."""

    model: BliprenForConditionalGeneration
    processor: BliprenProcessor
    settings: DoctorSettings
    images: list[Image.Image]
    captions: list[str]

    def batch(self, image_order: list[int] | None = None) -> dict[str, torch.Tensor]:
        """All eight images with their captions as one left-padded batch, images perhaps in another order."""
        order = image_order if image_order is not None else range(len(self.images))
        inputs = self.processor(images=[[self.images[i]] for i in order], return_tensors="pt")
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


def draw_patients(seed: int) -> tuple[list[Image.Image], list[str]]:
    """Eight plainly different images, each with a caption of its own."""
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
    # plain words: a small language model that is frozen cannot be made to say what it never read
    return images, [
        f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" for colour, shape in zip(colours, shapes)
    ]


def check_dimensions(patient: Patient) -> str:
    """Pixels become as many image features of the LLM's width as the processor writes placeholders."""
    model, processor = patient.model, patient.processor
    inputs = processor(images=patient.images[0], return_tensors="pt")
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    features = model.get_image_features(**pixels).pooler_output[0]
    width = model.get_input_embeddings().weight.shape[1]
    if features.shape != (placeholders, width):
        raise Illness(
            f"an image gives {features.shape[0]} features of width {features.shape[1]}, the prompt has {placeholders} "
            f"placeholders and the language model is {width} wide; the processor is of another checkpoint"
        )
    if not torch.isfinite(features).all():
        raise Illness("image features are not finite: the vision encoder's weights or precision are broken")
    patches = model.encode_images(**pixels).shape[1]
    return f"{patches} patches -> {placeholders} visual tokens of width {width}"


def check_end_of_sequence(patient: Patient) -> str:
    """One EOS, at which generation stops, ends every answer and has a label; padding has none."""
    processor, model = patient.processor, patient.model
    end, pad = processor.answer_end_id, processor.tokenizer.pad_token_id
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    if end is None or end not in stops:
        raise Illness(
            f"answers end in {processor.answer_end!r} ({end}), but generation stops at {stops}: captions would never "
            "stop; set generation_config.eos_token_id"
        )
    if pad is None:
        raise Illness("the tokenizer has no padding token; set tokenizer.pad_token")
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if max(end, pad) >= vocabulary:
        raise Illness(f"EOS {end} or padding {pad} is outside the language model's vocabulary of {vocabulary}")
    batch = patient.batch()
    for row, mask, ids in zip(batch["labels"], batch["attention_mask"], batch["input_ids"]):
        labelled = row[row != -100].tolist()
        if labelled.count(end) != 1 or labelled[-1] != end:
            raise Illness(f"labels hold {labelled.count(end)} end tokens instead of one at the end: {labelled}")
        if bool(((row != -100) & (mask == 0)).any()) or bool(
            ((row != -100) & (ids == processor.image_token_id)).any()
        ):
            raise Illness("padding or image tokens are in the labels")
    return f"EOS {processor.answer_end!r} ({end}) once in every label row; padding {pad} in none"


def check_prompt(patient: Patient) -> str:
    """Training and inference use the same prompt tokens, and no prompt ends in a space."""
    processor = patient.processor
    for prompt in [None, *processor.prompts, "What colour is it?"]:
        inference = processor(images=patient.images[0], text=prompt, return_tensors="pt")["input_ids"][0].tolist()
        count = inference.count(processor.image_token_id)
        training = processor.encode_prompt(prompt, num_visual_tokens=[count])
        if inference != training:
            raise Illness(f"prompt {prompt!r} is {training} in training and {inference} in inference")
        if processor.prompt_text(prompt).endswith(" "):
            raise Illness(f"prompt {prompt!r} ends in a space: no word could follow it as in training")
    return (
        f"{len(processor.prompts) + 2} prompts, the same tokens in training and inference: {processor.prompt_text()!r}"
    )


def check_gradients(patient: Patient) -> str:
    """Gradients reach every part of the connector and nothing frozen."""
    model = patient.model
    model.train()
    model.zero_grad(set_to_none=True)
    model(**patient.batch()).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    modules_in_training = [name for name in ("vision_tower", "language_model") if getattr(model.model, name).training]
    model.zero_grad(set_to_none=True)
    model.eval()
    if not trained:
        raise Illness("nothing is trained: every parameter is frozen")
    connector = {name.split(".")[1] for name in trained if name.startswith(("model.qformer.", "model.projector."))}
    for part in connector:
        if not any(name.startswith(f"model.{part}.") for name in reached):
            raise Illness(f"no gradient reaches the {part}: the loss does not depend on it")
    if frozen:
        raise Illness(f"{len(frozen)} frozen parameters got a gradient, such as {frozen[0]}")
    trainable_parts = {name.split(".")[1] for name in trained}
    if wrong := [name for name in modules_in_training if name not in trainable_parts]:
        raise Illness(f"{wrong[0]} is frozen but not in eval mode: its dropout would be active")
    return f"{len(reached)} of {len(trained)} trained parameters reached, no frozen one"


def check_batch_equals_single(patient: Patient) -> str:
    """A left-padded batch generates what single prompts do, and its loss is that of its rows."""
    model, processor = patient.model, patient.processor
    prompts = [None, "What is the colour of the shape in this picture?"]
    texts = [processor.prompts[0], prompts[1]]
    together = processor(images=[[i] for i in patient.images[:2]], text=texts, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        batch = model.generate(**together, max_new_tokens=8, do_sample=False)[:, together["input_ids"].shape[1] :]
        for row, image, text in zip(batch.tolist(), patient.images, texts):
            alone = processor(images=image, text=text, return_tensors="pt").to(model.device)
            single = model.generate(**alone, max_new_tokens=8, do_sample=False)[0, alone["input_ids"].shape[1] :]
            single = single.tolist()
            if row[: len(single)] != single:
                raise Illness(
                    f"in a padded batch the model says {processor.tokenizer.decode(row)!r}, alone "
                    f"{processor.tokenizer.decode(single)!r}: the language model does not honour the attention mask"
                )
    return "a left-padded batch generates the tokens of single prompts"


def check_reload(patient: Patient) -> str:
    """Saving and loading gives equal logits."""
    model = patient.model
    batch = patient.batch()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        patient.processor.save_pretrained(folder)
        again = BliprenForConditionalGeneration.from_pretrained(folder).to(model.device)
        difference = (model(**batch).logits - again(**batch).logits).abs().max().item()
        if BliprenProcessor.from_pretrained(folder).encode_prompt() != patient.processor.encode_prompt():
            raise Illness("the saved processor encodes the prompt otherwise than this one")
    if difference != 0:
        raise Illness(
            f"a saved and loaded copy differs by {difference:.2e} in its logits: weights were lost or rounded"
        )
    return "a saved and loaded copy gives equal logits"


def check_sees_image(patient: Patient) -> str:
    """It overfits eight images; then exchanging the images makes the loss at least 1.5 times as large."""
    state = copy.deepcopy(
        {k: v for k, v in patient.model.state_dict().items() if k.startswith(("model.q", "model.p"))}
    )
    model, settings = patient.model, patient.settings
    set_seed(settings.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    images = patient.batch()
    with torch.no_grad():
        pixels = {k: v for k, v in images.items() if k in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
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

    right = list(range(len(patient.images)))
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
        raise Illness(
            f"after {steps} steps on eight images the loss is {loss:.3f}, with the images exchanged {ratio:.2f} times "
            f"that (at least {SHUFFLED_LOSS_RATIO} is needed): the model ignores its image, or --steps is too small"
        )
    return f"{steps} steps on eight images: loss {loss:.3f}, with the images exchanged {ratio:.1f} times that"


CHECKS: dict[str, Callable[[Patient], str]] = {
    "dimensions fit": check_dimensions,
    "end of sequence": check_end_of_sequence,
    "prompt tokens": check_prompt,
    "gradients": check_gradients,
    "batch equals single": check_batch_equals_single,
    "save and load": check_reload,
    "sees the image": check_sees_image,
}


def examine(patient: Patient) -> list[tuple[str, bool, str]]:
    """Runs every check. Returns `(name, passed, what was measured or the reason)` for each."""
    results = []
    for name, check in CHECKS.items():
        try:
            results.append((name, True, check(patient)))
        except Illness as illness:
            results.append((name, False, str(illness)))
        except (ValueError, RuntimeError, IndexError) as error:  # the model itself refused what the check asked
            results.append((name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        mark = "ok  " if results[-1][1] else "FAIL"
        print(f"{mark} {name:<20} {results[-1][2]}", flush=True)
    return results


def doctor(settings: DoctorSettings) -> int:
    """Runs every check on a checkpoint. Returns 1 when one failed."""
    print(f"doctor: {settings.model}: {len(CHECKS)} checks, the last trains on eight drawn images and is undone")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # half precision on a CPU is slow, and too coarse for overfitting
    keywords = {"dtype": torch.float32} if device == "cpu" else {}
    model, processor = load_checkpoint(settings.model, **keywords)
    model.to(device)
    if settings.steps < 10:
        raise UserError(f"steps is {settings.steps}; the overfitting check looks every 10 steps, so give at least 10")
    images, captions = draw_patients(settings.seed)
    results = examine(Patient(model, processor, settings, images, captions))
    failed = [name for name, passed, _ in results if not passed]
    if failed:
        print(f"{settings.model}: {len(failed)} of {len(results)} checks failed: {', '.join(failed)}")
        return 1
    print(f"{settings.model}: all {len(results)} checks passed. Next: blipren embed {settings.model} DATASET CACHE")
    return 0
