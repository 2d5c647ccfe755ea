"""Import models of transformers' BLIP-2 family: the same encoder, Q-Former, projection and LLM, and equal logits."""

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    GenerationConfig,
    InstructBlipForConditionalGeneration,
)

from blipren import BliprenConfig, BliprenForConditionalGeneration, BliprenProcessor, BliprenQFormerConfig
from blipren.configuration_blipren import split_revision
from blipren.prompts_blipren import end_of_answer_id, pick_image_token
from blipren.qformer_weights_blipren import copy_blip2_weights
from blipren.training.errors import UserError, one_line
from blipren.training.hub.prompt_templates import image_first

_SOURCES = {"blip-2": Blip2ForConditionalGeneration, "instructblip": InstructBlipForConditionalGeneration}
_VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range", "qkv_bias",
)  # fmt: skip
_QFORMER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "layer_norm_eps", "initializer_range", "cross_attention_frequency",
    "encoder_hidden_size", "vocab_size", "max_position_embeddings", "pad_token_id",
)  # fmt: skip


def import_blip2(source: str, **hub_kwargs) -> tuple[BliprenForConditionalGeneration, BliprenProcessor]:
    """Make a BLIPren model of transformers' `Blip2ForConditionalGeneration` or `InstructBlipForConditionalGeneration`.

    Published models that this takes: Salesforce/blip2-opt-2.7b, Salesforce/blip2-opt-6.7b and their fine-tuned versions
    (-coco), Salesforce/instructblip-vicuna-7b and -13b. Those with FLAN-T5 are refused: BLIPren takes no encoder-decoder
    language models.

    Args:
        source: folder or Hub id, perhaps with @revision.
        hub_kwargs: `cache_dir`, `token`, `local_files_only`.

    Returns:
        Model, whose logits equal the source's within 1e-4, and processor.

    Raises:
        UserError: it is another kind of model, or its language model is an encoder-decoder.
    """
    name, revision = split_revision(str(source))
    hub_kwargs["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(name, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"there is no model at {source}: {one_line(error)}") from error
    if config.model_type not in _SOURCES:
        raise UserError(f"{source} is a {config.model_type} model; import takes {' and '.join(_SOURCES)}")
    if not config.use_decoder_only_language_model or config.text_config.is_encoder_decoder:
        raise UserError(
            f"the language model of {source} ({config.text_config.model_type}) is an encoder-decoder; BLIPren takes "
            "decoder-only ones, such as those of blip2-opt-2.7b and instructblip-vicuna-7b"
        )
    donor = _SOURCES[config.model_type].from_pretrained(name, **hub_kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, **hub_kwargs)
    image_token, image_token_id = _image_token(donor.config, tokenizer)
    model = _copy_weights(donor, config.model_type == "instructblip", image_token_id)
    ends = donor.generation_config.eos_token_id
    ends = [e for e in (ends if isinstance(ends, list) else [ends]) if e is not None]
    end = ends[0] if ends else end_of_answer_id(tokenizer, ends)
    pad = next(i for i in (tokenizer.pad_token_id, donor.generation_config.pad_token_id, end) if i is not None)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or [end],
        pad_token_id=pad,
        do_sample=False,
        max_new_tokens=64,
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    processor = BliprenProcessor(
        AutoImageProcessor.from_pretrained(name, **hub_kwargs),
        tokenizer,
        chat_template=image_first(tokenizer, image_token),
        image_token=image_token,
        num_visual_tokens=model.config.num_visual_tokens,
        answer_end=tokenizer.convert_ids_to_tokens(end),
        prompts=["Write a short description for the image." if config.model_type == "instructblip" else "a photo of"],
        qformer_reads_prompt=config.model_type == "instructblip",
    )
    if config.model_type == "instructblip":
        processor.qformer_tokenizer = AutoTokenizer.from_pretrained(name, subfolder="qformer_tokenizer", **hub_kwargs)
    return model, processor


def _image_token(config, tokenizer) -> tuple[str, int]:
    """Return the source's own placeholder and its id; of older configs without one, a free token."""
    index = getattr(config, "image_token_id", None)
    index = index if index is not None else getattr(config, "image_token_index", None)
    if index is not None and index < len(tokenizer):
        return tokenizer.convert_ids_to_tokens(index), index
    return pick_image_token(tokenizer)


@torch.no_grad()
def _copy_weights(donor, instruct: bool, image_token_id: int) -> BliprenForConditionalGeneration:
    vision, qformer = donor.config.vision_config, donor.config.qformer_config
    side = vision.image_size // vision.patch_size
    text_config = donor.language_model.config
    config = BliprenConfig(
        # InstructBLIP's vision encoder is BLIP-2's under another name
        vision_config=Blip2VisionConfig(**{field: getattr(vision, field) for field in _VISION_FIELDS}),
        text_config=text_config,
        qformer_config=BliprenQFormerConfig(
            **{f: getattr(qformer, f) for f in _QFORMER_FIELDS if getattr(qformer, f, None) is not None},
            num_query_tokens=donor.config.num_query_tokens,
            use_text=instruct,
        ),
        projector="linear",
        vision_feature_select="full",
        num_prefix_tokens=1,
        vision_grid=[side, side],
        image_token_id=image_token_id,
        num_visual_tokens=donor.config.num_query_tokens,
        qformer_reads_prompt=instruct,
    )
    config.dtype = donor.dtype
    model = BliprenForConditionalGeneration(config)
    inner = model.model
    inner.vision_tower.to(donor.dtype).load_state_dict(donor.vision_model.state_dict())
    inner.language_model.to(donor.dtype).load_state_dict(donor.language_model.base_model.state_dict())
    model.lm_head.to(donor.dtype).load_state_dict(donor.language_model.get_output_embeddings().state_dict())
    weights = {k: v.float() for k, v in donor.state_dict().items() if k.startswith(("qformer.", "query_tokens"))}
    for kind in ("weight", "bias"):  # InstructBLIP keeps the norm of its inputs with the embeddings
        if (norm := weights.pop(f"qformer.embeddings.layernorm.{kind}", None)) is not None:
            weights[f"qformer.layernorm.{kind}"] = norm
    copy_blip2_weights(inner.qformer, weights)
    inner.projector.load_state_dict(donor.language_projection.state_dict())
    model.tie_weights()
    model.eval()
    model.freeze()
    return model
