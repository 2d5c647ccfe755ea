"""Answers of the language model of `quickstart --world conversations` about notes in words, without a picture.

    python benchmarks/notes.py --out notes.json

Each text lists the objects of two scenes as the training of the language model does, in texts that it has not read. An answer
is right if every token is the likeliest one behind the right tokens before it.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from parts.measure import print_report
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from blipren.training.quickstart.steps import TOWERS
from blipren.training.quickstart.train_llm import Course, embed_words, text_batch, write_document

COURSE = Course(shuffled=0.7, crowded=True, conversations=True)
BATCH = 24


@torch.no_grad()
def share_right(model, tokenizer, seed: int, texts: int) -> dict[str, tuple[float, int]]:
    """Return the share of right answers to each question about two scenes, and how often it was asked."""
    right = defaultdict(list)
    about_two = [index for index in range(2 * texts) if index % 8 < 6][:texts]
    for start in range(0, texts, BATCH):
        indices = about_two[start : start + BATCH]
        batch = text_batch(tokenizer, seed, indices, COURSE)
        labels = batch.pop("labels")[:, 1:]
        embeddings = embed_words(model, *(batch.pop(name) for name in ("input_ids", "weights", "scale")))
        likeliest = model(inputs_embeds=embeddings, **batch, use_cache=False).logits.argmax(dim=-1)[:, :-1]
        for row, index in enumerate(indices):
            places = (labels[row] != -100).nonzero()[:, 0]
            equal = (likeliest[row] == labels[row])[places]
            ends = (labels[row][places] == tokenizer.eos_token_id).nonzero()[:, 0] + 1
            answers = equal.tensor_split(ends.tolist())
            for (question, _), found in zip(write_document(seed, index, COURSE)[1], answers):
                right[question.strip()].append(bool(found.all()))
    return {question: (sum(found) / len(found), len(found)) for question, found in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", type=Path, default=TOWERS / "conversations-llm")
    parser.add_argument("--texts", type=int, default=240)
    parser.add_argument("--seed", type=int, default=999, help="of the texts")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(options.llm, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.llm)
    found = share_right(model, tokenizer, options.seed, options.texts)
    report = {question: {"right": right, "asked": asked} for question, (right, asked) in found.items()}
    print_report(report, options.out)


if __name__ == "__main__":
    main()
