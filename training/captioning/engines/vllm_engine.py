"""Captions by vLLM's Python engine, from the checkpoint's own code: pictures go in, continuous batching is vLLM's."""

from __future__ import annotations

import importlib.util
from typing import Any

from blipren.training.captioning.choice import CaptionColumn
from blipren.training.captioning.decoder import Answer, answer_seed
from blipren.training.captioning.pictures import PictureBatch
from blipren.training.commands.caption import CaptionSettings
from blipren.training.engine.loading import load_config
from blipren.training.errors import UserError

UNSUPPORTED = ("num_beams", "no_repeat_ngram_size", "repetition_penalty")


def check_vllm(s: CaptionSettings) -> None:
    """Raise `UserError` if vLLM is missing, cannot load the checkpoint, or reads a setting otherwise than we do."""
    for name in UNSUPPORTED:
        if getattr(s, name) != getattr(CaptionSettings, name):
            raise UserError(f"vLLM has no {name}, or reads it otherwise: use --engine local, or leave it out")
    if load_config(s.model).checkpoint_type == "bridge":
        raise UserError(
            f"{s.model} is a bridge: vLLM needs a full checkpoint (blipren convert {s.model} FULL --to full)"
        )
    if importlib.util.find_spec("vllm") is None:
        raise UserError("the engine vllm needs vLLM, in an environment of its own: see docs/how-to/caption.md")


class VllmEngine:
    """vLLM's engine with a full checkpoint.

    Args:
        processor: of the checkpoint. columns: with the prompts.
    """

    needs_features = False

    def __init__(self, s: CaptionSettings, processor: Any, columns: list[CaptionColumn]):
        import vllm

        config = load_config(s.model)
        prompts = [column.prompt for column in columns]
        longest = max(len(processor.encode_prompt(prompt)) for prompt in prompts)
        dtype = str(config.dtype).removeprefix("torch.") if s.precision == "auto" else s.precision
        self.llm = vllm.LLM(
            model=s.model,
            trust_remote_code=True,
            dtype=dtype,
            max_model_len=longest + s.max_new_tokens + 1,
            limit_mm_per_prompt={"image": 1},
            max_num_seqs=max(s.batch_size, 2),
        )
        self.vllm, self.s, self.processor = vllm, s, processor
        self.texts = [processor.prompt_text(prompt) for prompt in prompts]
        self.rows_per_batch = s.rows_per_shard

    def __call__(self, patches: None, mask: None, batch: PictureBatch) -> list[list[list[Answer]]]:
        """Return the answers of each kept picture, for each prompt, with all candidates."""
        s = self.s
        requests = [{"prompt": t, "multi_modal_data": {"image": image}} for image in batch.images for t in self.texts]
        seeds = [answer_seed(seed, p, 0) for seed in batch.seeds for p in range(len(self.texts))]
        params = [
            self.vllm.SamplingParams(
                n=s.candidates,
                temperature=s.temperature,
                top_p=s.top_p,
                seed=seeds[i] if seeds else None,
                max_tokens=s.max_new_tokens,
                logprobs=0,
            )
            for i in range(len(requests))
        ]
        found = [
            [self._answer(output) for output in result.outputs]
            for result in self.llm.generate(requests, params, use_tqdm=False)
        ]
        count = len(self.texts)
        return [found[i : i + count] for i in range(0, len(found), count)]

    def _answer(self, output: Any) -> Answer:
        ended = output.finish_reason == "stop"
        ids = list(output.token_ids)
        mean = output.cumulative_logprob / max(1, len(ids))
        return Answer(self.processor.decode_answer(ids), len(ids) - ended, ended, round(mean, 5))
