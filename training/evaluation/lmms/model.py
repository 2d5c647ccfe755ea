"""A BLIPren checkpoint as a model of lmms-eval. Importing this module needs lmms-eval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from blipren.training.data.sources.images import to_rgb
from blipren.training.evaluation.features import encode_images
from blipren.training.evaluation.generation import generate_batch, load_model

IMAGE_MARKS = ("<image>", "<IMAGE>", "<img>")


class Blipren(lmms):
    """A BLIPren checkpoint.

    Args:
        pretrained: folder or Hub id. device: `auto`, `cuda`, `cpu`, `cuda:1`, ... batch_size: answers generated together.
        max_new_tokens: limit of answers whose task sets none.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: int | str = 1, max_new_tokens: int = 64, **kwargs
    ) -> None:
        super().__init__()
        if kwargs:
            raise ValueError(f"unknown model_args {', '.join(kwargs)}; there are pretrained, device, max_new_tokens")
        self.model, self.processor = load_model(pretrained, device or "auto")
        self.batch_size_per_gpu = 1 if batch_size == "auto" else int(batch_size)
        self.max_new_tokens = int(max_new_tokens)

    # ---- attributes that the evaluator reads -----------------------------------------------------------------------

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def config(self):
        return self.model.config

    @property
    def device(self):
        return self.model.device

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    @property
    def eot_token_id(self) -> int:
        return self.processor.answer_end_id

    # ---- images and prompts ----------------------------------------------------------------------------------------

    def _photos(self, doc_to_visual, doc_id, task: str, split: str) -> list[Image.Image]:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        odd = next((v for v in visuals if not isinstance(v, Image.Image)), None)
        if odd is not None:
            raise ValueError(f"task {task}: BLIPren takes images, and this is {type(odd).__name__}")
        return [to_rgb(visual) for visual in visuals]

    def _inputs(self, contexts: Sequence[str], photos: Sequence[Sequence[Image.Image]]):
        """Prompt ids of each row, and the model's image inputs for all photos of all rows in order."""
        flat = [photo for own in photos for photo in own]
        features = encode_images(self.model, self.processor, flat, len(flat)) if flat else None
        counts = iter(features.visual_tokens(self.config) if features is not None else [])
        prompts = []
        for context, own in zip(contexts, photos):
            for mark in IMAGE_MARKS:  # images come before the prompt, as in training
                context = context.replace(mark, "")
            prompts.append(
                list(self.processor.encode_prompt(context.strip(), num_visual_tokens=[next(counts) for _ in own]))
            )
        return prompts, {} if features is None else features.model_inputs(self.device)

    # ---- lmms-eval's requests --------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_until(self, requests) -> list[str]:
        """Return answers in the order of the requests. Requests with equal generation settings are batched together."""
        results: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="BLIPren") as bar:
            for members in groups.values():
                members.sort(key=lambda index: len(requests[index].args[0]))
                for start in range(0, len(members), self.batch_size):
                    chosen = members[start : start + self.batch_size]
                    for index, text in zip(chosen, self._answer([requests[i].args for i in chosen])):
                        results[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args[:2], text)
                    bar.update(len(chosen))
        return results

    def _answer(self, rows: Sequence[tuple]) -> list[str]:
        contexts, settings, visuals, ids, tasks, splits = zip(*rows)
        photos = [self._photos(*row) for row in zip(visuals, ids, tasks, splits)]
        prompts, images = self._inputs(contexts, photos)
        asked = dict(settings[0])
        until = asked.get("until") or []
        generation = {
            "max_new_tokens": int(asked.get("max_new_tokens") or self.max_new_tokens),
            "num_beams": int(asked.get("num_beams") or 1),
            "do_sample": bool(asked.get("do_sample")) or float(asked.get("temperature") or 0) > 0,
        }
        if generation["do_sample"]:
            generation |= {k: float(asked[k]) for k in ("temperature", "top_p") if asked.get(k) is not None}
        texts = []
        for answer in generate_batch(self.model, self.processor, prompts, images, **generation):
            text = answer["text"]
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            texts.append(text.strip())
        return texts

    @torch.no_grad()
    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Return for each continuation its loss per token (lmms-eval takes the smallest) and whether greedy search gives it."""
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="BLIPren"):
            context, target, doc_to_visual, doc_id, task, split = request.args
            text = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            photos = self._photos(doc_to_visual, doc_id, task, split)
            (prompt,), images = self._inputs([context], [photos])
            answer = list(self.processor.encode_answer(text))
            ids = torch.tensor([prompt + answer], device=self.device)
            at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1, device=self.device)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_at=at, **images).logits
            wanted = torch.tensor(answer, device=self.device)
            loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
            results.append((float(loss), bool((logits.argmax(dim=-1) == wanted).all())))
        return results

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError("BLIPren answers single questions: choose tasks of one round")
