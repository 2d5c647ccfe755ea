"""Whether a language model can read several answers behind one shared prefix: tried out, not known by its name."""

import torch

from blipren.training.data.batches.masks import build_attention_mask

PREFIX_LENGTH, SEGMENT_LENGTHS = 7, (5, 4, 6)  # of the trial


def attention_window(text_config) -> int | None:
    """Return the length of the shortest attention window in tokens, or None where every layer attends to all tokens."""
    if getattr(text_config, "use_sliding_window", None) is False:
        return None
    windows = [getattr(text_config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is not None and not any("sliding" in kind or "chunked" in kind for kind in layer_types):
        return None
    return min((w for w in windows if w), default=None)


@torch.no_grad()
def unsupported_reason(model, longest: int) -> str | None:
    """Return why a shared prefix would not give the states of separate rows, or None if it does.

    Args:
        model: a `BliprenForConditionalGeneration`.
        longest: tokens of the longest prompt and answer together. The mask replaces a sliding window, so the window
            must be at least as long.
    """
    text_config, language_model = model.config.text_config, model.parts()["llm"]
    window = attention_window(text_config)
    if window is not None and window < longest:
        return f"its attention window of {window} tokens is shorter than the longest row of {longest}"
    embed = language_model.get_input_embeddings()
    device, dtype = embed.weight.device, embed.weight.dtype
    size = min(embed.num_embeddings, 1000)
    draw = torch.Generator().manual_seed(0)
    prefix = torch.randint(size, (PREFIX_LENGTH,), generator=draw)
    segments = [torch.randint(size, (length,), generator=draw) for length in SEGMENT_LENGTHS]
    was_training = language_model.training
    language_model.eval()
    try:
        separate = []
        for segment in segments:
            ids = torch.cat([prefix, segment])[None].to(device)
            states = language_model(inputs_embeds=embed(ids), use_cache=False).last_hidden_state
            separate.append(states[0, PREFIX_LENGTH:])
        ids = torch.cat([prefix, *segments])[None].to(device)
        segment_ids = torch.cat(
            [torch.zeros(PREFIX_LENGTH), *(torch.full_like(s, i + 1) for i, s in enumerate(segments))]
        )
        positions = torch.cat([torch.arange(PREFIX_LENGTH), *(PREFIX_LENGTH + torch.arange(len(s)) for s in segments)])
        mask = build_attention_mask(
            {"block_ids": torch.zeros_like(ids), "segment_ids": segment_ids[None].to(device)}, language_model
        )
        try:
            shared = language_model(
                inputs_embeds=embed(ids),
                attention_mask=mask,
                position_ids=positions[None].to(device),
                use_cache=False,
            ).last_hidden_state[0, PREFIX_LENGTH:]
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            return f"its attention does not take a 4-D mask ({' '.join(str(error).split())[:120]})"
    finally:
        language_model.train(was_training)
    separate = torch.cat(separate).float()
    difference = ((shared.float() - separate).norm() / separate.norm()).item()
    if not difference <= (1e-3 if dtype == torch.float32 else 5e-2):
        return f"its layers pass states from one answer to the next (states differ by {difference:.1%})"
    return None
