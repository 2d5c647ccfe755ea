"""Assisted generation with images: what the generators of candidates get in place of the images."""

import torch
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    AssistedCandidateGeneratorDifferentTokenizers,
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)


def reads_images(model) -> bool:
    """Return whether a model of transformers takes images."""
    return "image" in model.input_modalities


def assistant_image_features(assistant, image_inputs: dict[str, torch.Tensor], num_visual_tokens: list[int]):
    """Compute the image features of an assistant that reads images.

    Args:
        assistant: `BliprenForConditionalGeneration`.
        image_inputs: arguments of its `get_image_features`.
        num_visual_tokens: placeholders of each image in the prompt.

    Raises:
        ValueError: when the assistant has another number of visual tokens.
    """
    if not assistant.config.qformer_reads_prompt:
        image_inputs = {key: value for key, value in image_inputs.items() if not key.startswith("qformer_")}
    inputs = {key: value.to(assistant.device) for key, value in image_inputs.items() if value is not None}
    features = assistant.get_image_features(**inputs, return_dict=True)
    if (counts := [len(image) for image in features.pooler_output]) != num_visual_tokens:
        raise ValueError(
            f"the assistant model has {counts} visual tokens for the images, this model {num_visual_tokens}: use an "
            "assistant with as many, or a text-only language model"
        )
    return features


def adapt_candidate_generator(
    generator: CandidateGenerator, prompt: torch.LongTensor, image_token_id: int, model_kwargs: dict
) -> None:
    """Prepare a candidate generator, in place, for a prompt with placeholders; it never proposes one.

    An assistant that reads images gets its own image features. A text-only assistant does not attend to the
    placeholders, whose id may lie beyond its vocabulary. Candidates of prompt lookup end in front of a placeholder.

    Args:
        generator: made by `GenerationMixin` of transformers; of a kind that is not named above it is left unchanged.
        prompt: `(1, length)` token ids.
        image_token_id: id of the placeholder.
        model_kwargs: of `generate`; `mm_encoder_outputs` may have `assistant_image`, the assistant's image features.
    """
    replacement = 0  # any id of the vocabulary
    if isinstance(generator, PromptLookupCandidateGenerator):
        if generator.eos_token_id is not None:
            replacement = int(generator.eos_token_id.flatten()[0])  # candidates end there
    elif isinstance(generator, AssistedCandidateGenerator):
        assistant_kwargs = generator.assistant_kwargs
        if reads_images(generator.assistant_model):
            replacement = generator.assistant_model.config.image_token_id
            if own := (model_kwargs.get("mm_encoder_outputs") or {}).get("assistant_image"):
                assistant_kwargs["mm_encoder_outputs"] = {"image": own}
        else:
            assistant_kwargs.pop("mm_encoder_outputs", None)
            assistant_kwargs.pop("position_ids", None)  # counted with the placeholders
            if isinstance(generator, AssistedCandidateGeneratorDifferentTokenizers):
                replacement = image_token_id  # it decodes the prompt without special tokens, and encodes it again
            else:
                prompt = prompt.to(generator.assistant_model.device)
                mask = assistant_kwargs.get("attention_mask")
                mask = torch.ones_like(prompt) if mask is None else mask
                assistant_kwargs["attention_mask"] = mask.masked_fill(prompt == image_token_id, 0)
    else:
        return
    get_candidates = generator.get_candidates

    def get_candidates_without_placeholders(input_ids: torch.LongTensor, **kwargs):
        length = input_ids.shape[1]
        candidates, logits = get_candidates(input_ids.masked_fill(input_ids == image_token_id, replacement), **kwargs)
        new = candidates[:, length:].to(input_ids.device)
        if (found := (new == image_token_id).nonzero()).numel():
            end = int(found[0, 1])
            new, logits = new[:, :end], None if logits is None else logits[:, :end]
        return torch.cat([input_ids, new], dim=1), logits

    generator.get_candidates = get_candidates_without_placeholders


__all__ = ["adapt_candidate_generator", "assistant_image_features", "reads_images"]
