"""Answers drawn from the model's own distribution, for training that rewards what the model says."""

import torch


@torch.no_grad()
def sample_answers(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    features: dict[str, torch.Tensor],
    end: int,
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
) -> list[list[int]]:
    """Return token ids of `samples` answers to each left-padded prompt [n, length], up to and with `end` where they reach
    it: n * samples lists, those of a prompt together. A temperature of 0 takes the likeliest token.

    `generate` draws them too, but computes a prompt once a sample, keeps rows that have ended until the longest has, and
    draws by `torch.multinomial`: 2.7 times the time for 36 photos of five samples.
    """
    positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        logits_to_keep=1,
        use_cache=True,
        **features,
    )
    drawn: list[list[int]] = [[] for _ in range(len(input_ids) * samples)]
    going = torch.arange(len(drawn), device=input_ids.device)  # answers that have not ended, one row each
    rows, cache = going // samples, outputs.past_key_values
    cache.reorder_cache(rows)
    logits, mask, position = outputs.logits[rows, -1].float(), attention_mask[rows], positions[rows, -1:]
    image_token = model.config.image_token_id  # drawn as a word it would be taken for an image in training
    for length in range(1, max_new_tokens + 1):
        logits[:, image_token : image_token + 1] = -torch.inf  # empty where the placeholder lies behind the vocabulary
        if temperature:
            cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
            tokens = torch.searchsorted(cumulative, torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:])[:, 0]
        else:
            tokens = logits.argmax(dim=-1)
        for answer, token in zip(going.tolist(), tokens.tolist(), strict=True):
            drawn[answer].append(token)
        kept = (tokens != end).nonzero()[:, 0]
        if not len(kept) or length == max_new_tokens:
            break
        if len(kept) < len(tokens):
            cache.reorder_cache(kept)
            going, tokens, mask, position = going[kept], tokens[kept], mask[kept], position[kept]
        mask, position = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), position + 1
        outputs = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        logits = outputs.logits[:, -1].float()
    return drawn
