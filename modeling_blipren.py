"""BLIPren: a frozen vision encoder, a Q-Former and projector, any causal language model.

`BliprenModel` has the layout of transformers' LLaVA: vision tower, connector, language model without head.
`BliprenForConditionalGeneration` adds the language model's head, with its bias, scaling and soft-capping.
"""

import logging
import os
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .assisted_generation_blipren import adapt_candidate_generator, assistant_image_features, reads_images
from .base_blipren import BliprenPreTrainedModel
from .base_models_blipren import base_model_reference, load_base_code
from .configuration_blipren import BliprenConfig, BliprenQFormerConfig, split_revision
from .image_features_blipren import IMAGE_INPUTS, VIDEO_INPUTS, BliprenImageFeatures, BliprenImageFeaturesMixin
from .memory_generation_blipren import masked_patches
from .projector_blipren import BliprenMlp, BliprenMoeProjector, build_projector
from .prompts_blipren import end_of_answer_id, pick_image_token, pick_video_token
from .qformer_blipren import BliprenQFormer
from .qformer_weights_blipren import copy_bert_weights
from .ranked_generation_blipren import BliprenRankingMixin
from .vision_blipren import load_vision_setup, used_parameters

logger = logging.getLogger(__name__)
# name of the key-value cache in outputs: transformers 5.24 renamed it
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


@dataclass
class BliprenModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` with image features `(num_visual_tokens of all images, text_hidden)` and router outputs."""

    image_hidden_states: torch.Tensor | None = None
    router_probs: torch.Tensor | None = None
    router_aux_loss: torch.Tensor | None = None


@dataclass
class BliprenCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with image features and router outputs.
    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): cross-entropy summed over label tokens, divided by their number.
        logits (`torch.Tensor` of shape `(batch, length, vocab_size)`): equal to the language model's own; with
            `label_logits_only`, `(num_label_tokens, vocab_size)`.
        past_key_values (from transformers 5.24 on `cache`), hidden_states, attentions: of the language model.
        image_hidden_states (`torch.Tensor` of shape `(num_visual_tokens of all images, text_hidden)`): image features.
        router_probs (`torch.Tensor` of shape `(num_images, num_experts)`, *optional*): of the `moe` projector.
        router_aux_loss (`torch.Tensor` of shape `()`, *optional*): balance and z-loss, already part of `loss`.
    """

    image_hidden_states: torch.Tensor | None = None
    router_probs: torch.Tensor | None = None
    router_aux_loss: torch.Tensor | None = None


class BliprenTextEmbedding(nn.Module):
    """Embedding of a language model for token ids among which placeholders may lie beyond the vocabulary."""

    def __init__(self, embedding: nn.Module, placeholders: list[int]):
        super().__init__()
        self.embedding, self.placeholders = embedding, placeholders

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        for placeholder in self.placeholders:
            input_ids = input_ids.masked_fill(input_ids == placeholder, 0)
        return self.embedding(input_ids)


class BliprenModel(BliprenImageFeaturesMixin, BliprenPreTrainedModel):
    """Vision tower, connector, and language model without head."""

    def __init__(self, config: BliprenConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        if config.second_vision_config is not None:
            self.second_vision_tower = AutoModel.from_config(config.second_vision_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.qformer = BliprenQFormer(config.qformer_config) if config.connector == "qformer" else None
        # image features are as wide as embeddings, which can be narrower than the layers (OPT)
        self.projector = build_projector(config, self.language_model.get_input_embeddings().weight.shape[1])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        second_pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        second_pixel_values_videos: torch.Tensor | None = None,
        seconds_per_frame: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        patch_attention_mask: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BliprenImageFeatures] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BliprenModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if self.training and not torch.compiler.is_compiling():
            self._keep_frozen_in_eval()
        given = dict(mm_encoder_outputs or {})
        if given.get("image") is None and (pixel_values is not None or patch_features is not None):
            given["image"] = self.get_image_features(
                pixel_values,
                pixel_attention_mask,
                spatial_shapes,
                second_pixel_values,
                patch_features,
                patch_attention_mask,
                qformer_input_ids,
                qformer_attention_mask,
                return_dict=True,
            )
        if given.get("video") is None and pixel_values_videos is not None:
            given["video"] = self.get_video_features(
                pixel_values_videos, second_pixel_values_videos, seconds_per_frame, return_dict=True
            )
        ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        masks = {
            kind: input_ids == token for kind, token in ids.items() if token is not None and input_ids is not None
        }
        if inputs_embeds is None:
            # the ids of placeholders may lie beyond the vocabulary, so they are not embedded
            embedded = input_ids
            for mask in masks.values():
                embedded = embedded.masked_fill(mask, 0)
            inputs_embeds = self.get_input_embeddings()(embedded)
        image, image_features = given.get("image"), None
        for kind in ("image", "video"):
            if given.get(kind) is not None:
                features = torch.cat(list(given[kind].pooler_output), dim=0)  # [tokens of all images or videos, D]
                features = features.to(inputs_embeds.device, inputs_embeds.dtype)
                mask = masks.get(kind)
                if mask is None:
                    mask = self._find_placeholders(inputs_embeds, ids[kind])
                self._check_token_count(mask, features.shape[0], kind)
                inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), features)
                image_features = features if image_features is None else image_features
            elif kind in masks and input_ids.shape[1] > 1:
                self._check_token_count(masks[kind], 0, kind)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        return BliprenModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_features,
            router_probs=image.get("router_probs") if image is not None else None,
            router_aux_loss=image.get("router_aux_loss") if image is not None else None,
        )

    def _find_placeholders(self, inputs_embeds: torch.Tensor, token_id: int) -> torch.Tensor:
        """Return the mask `(batch, length)` of the placeholder's embedding, as models of transformers do."""
        embeddings = self.get_input_embeddings()
        if token_id >= embeddings.weight.shape[0]:
            raise ValueError(
                "images with inputs_embeds need a placeholder inside the vocabulary, and this model's lies beyond it: "
                "pass input_ids instead"
            )
        token = torch.tensor(token_id, device=embeddings.weight.device)
        return (inputs_embeds == embeddings(token).to(inputs_embeds)).all(dim=-1)

    @staticmethod
    def _check_token_count(mask: torch.Tensor, num_features: int, kind: str) -> None:
        if torch.compiler.is_compiling():
            return  # a condition that depends on data would break the graph
        num_tokens = int(mask.sum())
        if num_tokens != num_features:
            raise ValueError(
                f"{kind.capitalize()} features and {kind} tokens do not match, tokens: {num_tokens}, features: "
                f"{num_features}"
            )


def _check_complete(name: str, keys) -> None:
    """Raise `ValueError` if a base model lacks weights, which transformers would fill with random values."""
    if keys := sorted(keys):
        raise ValueError(f"{name} lacks {len(keys)} weights of its architecture, such as {keys[0]!r}")


def build_lm_head(text_config) -> nn.Linear:
    """Build a head with the width, vocabulary and bias that `AutoModelForCausalLM` has for this config."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(text_config)
    head = causal_lm.get_output_embeddings()
    return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)


def copy_weights(module: nn.Module, source: nn.Module) -> None:
    """Copy weights with their dtypes from a module of the same class: some tensors may be float32 among halves."""
    dtypes = {name: tensor.dtype for name, tensor in [*source.named_parameters(), *source.named_buffers()]}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
    module.load_state_dict(source.state_dict())


def scale_logits(logits: torch.Tensor, text_config) -> torch.Tensor:
    """Apply the logit scaling or soft-capping of Cohere, Granite, Falcon-H1 and Gemma, by the fields of the config."""
    if (scale := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (multiplier := getattr(text_config, "lm_head_multiplier", None)) is not None:
        logits = logits * multiplier
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


LOSS_CHUNK = 256  # positions whose logits exist at a time; fewer are slower, more take more memory


def summed_cross_entropy(
    head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor, text_config
) -> torch.Tensor:
    """Compute the summed cross-entropy of `(n, hidden)` states at `(n,)` targets, `LOSS_CHUNK` positions at a time.

    Raises:
        ValueError: when the head is not a plain linear layer, or the family scales or caps its logits.
    """
    one = torch.ones((), dtype=torch.float32)
    if type(head) is not nn.Linear or scale_logits(one, text_config) != one:
        raise ValueError(
            f"the loss of {text_config.model_type} with a {type(head).__name__} as head cannot be computed in chunks: "
            "that needs a plain linear head, whose logits are neither scaled nor capped"
        )
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK, chunking_method=None)
    bias = None if head.bias is None else head.bias.to(dtype)
    return F.linear_cross_entropy(
        hidden_states.to(dtype), head.weight.to(dtype), targets, linear_bias=bias, reduction="sum", options=options
    )


class BliprenForConditionalGeneration(
    BliprenImageFeaturesMixin, BliprenRankingMixin, BliprenPreTrainedModel, GenerationMixin
):
    """The whole model: generates text from images and text."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # the heads of stage 1, in a checkpoint of BliprenForImageTextRetrieval
    _keys_to_ignore_on_load_unexpected = [r"^(vision_proj|text_proj|itm_head|text_head)\.", r"^logit_(scale|bias)$"]

    def __init__(self, config: BliprenConfig):
        super().__init__(config)
        self.model = BliprenModel(config)
        self.lm_head = build_lm_head(config.text_config)
        # the path of the embedding differs between families
        embeddings = self.model.get_input_embeddings()
        path = next(name for name, module in self.model.language_model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{path}.weight"}
        self.post_init()
        self.freeze()

    @classmethod
    def _from_config(cls, config: BliprenConfig, **kwargs):
        """Make a model of a config, as `AutoModel.from_config` does; for vLLM a `BliprenModel`.

        vLLM has attention and head of its own. It takes from AutoModel the model without head, after it has set the
        attention of the language model to `"vllm"`; AutoModel of our checkpoints is the whole model.
        """
        if config.text_config._attn_implementation != "vllm":
            return super()._from_config(config, **kwargs)
        model = BliprenModel._from_config(config, **kwargs)
        text_model, get_embedding = model.language_model, model.language_model.get_input_embeddings
        # vLLM embeds the placeholders too, before it replaces them
        placeholders = [i for i in (config.image_token_id, config.video_token_id) if i is not None]
        text_model.get_input_embeddings = lambda: BliprenTextEmbedding(get_embedding(), placeholders)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        label_logits_only: bool = False,
        logits_at: torch.LongTensor | None = None,
        targets: torch.LongTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        second_pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        second_pixel_values_videos: torch.Tensor | None = None,
        seconds_per_frame: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        patch_attention_mask: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BliprenImageFeatures] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BliprenCausalLMOutputWithPast:
        r"""Compute logits and, with labels or targets, the loss.

        Args:
            input_ids: `(batch, length)`, with the placeholder where image features go.
            pixel_values: images of the whole batch in order, see [`encode_images`].
            pixel_values_videos, second_pixel_values_videos, seconds_per_frame: videos of the whole batch in order, see
                [`encode_videos`].
            attention_mask: `(batch, length)`, or a 4-D mask that the language model uses unchanged.
            past_key_values: key-value cache of the language model; `cache` is its name from transformers 5.24 on.
            labels: `(batch, length)`, -100 where there is no loss; image tokens and padding never have one.
            shift_labels: `(batch, length)`, the label of the next token at each position, used unchanged instead of
                `labels` (sequence parallelism).
            logits_to_keep: as in transformers; 0 keeps all.
            label_logits_only: compute logits only where a label is predicted, `(num_label_tokens, vocab_size)`.
            logits_at: `(n,)` positions in the flattened `(batch * length)`: compute only these logits, `(n, vocab_size)`.
                For losses outside of the model, without `labels`.
            targets: `(n,)` tokens to predict at `logits_at`: `loss` is their summed cross-entropy and `logits` is `None`,
                see [`summed_cross_entropy`] (needs torch 2.13).
            num_items_in_batch: divisor of the summed loss: number of label tokens of the global batch; by default of this
                batch.
            patch_features, patch_attention_mask, qformer_input_ids, qformer_attention_mask: see [`get_image_features`].
            mm_encoder_outputs: `{"image": BliprenImageFeatures, "video": ...}`, instead of images and videos.

        Raises:
            ValueError: when image tokens and image features differ in number, or arguments exclude each other.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            second_pixel_values=second_pixel_values,
            pixel_values_videos=pixel_values_videos,
            second_pixel_values_videos=second_pixel_values_videos,
            seconds_per_frame=seconds_per_frame,
            patch_features=patch_features,
            patch_attention_mask=patch_attention_mask,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = None
        if labels is not None and shift_labels is None:
            labels = labels.to(hidden_states.device)
            if input_ids is not None:
                labels = labels.masked_fill(input_ids == self.config.image_token_id, -100)
                if self.config.video_token_id is not None:
                    labels = labels.masked_fill(input_ids == self.config.video_token_id, -100)
            if attention_mask is not None and attention_mask.dim() == 2:
                labels = labels.masked_fill(attention_mask == 0, -100)
            # tokens < n predict n
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if label_logits_only:
            if shift_labels is None:
                raise ValueError("label_logits_only needs labels")
            keep = shift_labels != -100
            hidden_states, shift_labels = hidden_states[keep], shift_labels[keep]
        elif not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            if shift_labels is not None:
                raise ValueError("labels need all logits, or label_logits_only; not logits_to_keep")
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept, :]
        if targets is not None and logits_at is None:
            raise ValueError("targets needs logits_at: the positions that predict them")
        if logits_at is not None:
            if shift_labels is not None:
                raise ValueError("logits_at excludes labels: compute the loss from the logits that it returns")
            hidden_states = hidden_states.flatten(0, 1)[logits_at]
        if targets is not None:
            loss, logits = summed_cross_entropy(self.lm_head, hidden_states, targets, self.config.text_config), None
        else:
            logits = scale_logits(self.lm_head(hidden_states), self.config.text_config)
        if shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=shift_labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
            if outputs.router_aux_loss is not None:
                share = 1.0  # the auxiliary loss of a micro-batch is weighted by its part of the global batch
                if num_items_in_batch is not None:
                    share = (shift_labels != -100).sum() / num_items_in_batch
                loss = loss + share * outputs.router_aux_loss
        return BliprenCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            router_probs=outputs.router_probs,
            router_aux_loss=outputs.router_aux_loss,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        use_memory: bool | None = None,
        use_reranker: bool | None = None,
        **kwargs,
    ):
        """Generate as in transformers; image and video features are computed once.

        An `assistant_model` may be a language model with the same tokenizer, or a model of this class.

        Args:
            use_memory, use_reranker: `False` leaves the model's memory or reranker out, `True` is an error where it cannot
                be used; by default one is used for captions, the memory first, see [`BliprenRankingMixin`].

        Raises:
            ValueError: when an assistant that reads images has another number of visual tokens, or is given a video.
        """
        video_kwargs = {key: kwargs.pop(key) for key in VIDEO_INPUTS if key in kwargs}
        if video_kwargs.get("pixel_values_videos") is not None:
            if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
                raise ValueError("assisted generation takes images and no videos: leave the assistant out")
            features = self.get_video_features(**video_kwargs, return_dict=True)
            kwargs["mm_encoder_outputs"] = {"video": features} | (kwargs.get("mm_encoder_outputs") or {})
        image_kwargs = {key: kwargs.pop(key) for key in IMAGE_INPUTS if key in kwargs}
        if any(image_kwargs.get(key) is not None for key in ("pixel_values", "patch_features")):
            features = self.get_image_features(**image_kwargs, return_dict=True)
            kwargs["mm_encoder_outputs"] = {"image": features} | (kwargs.get("mm_encoder_outputs") or {})
            assistant = kwargs.get("assistant_model")
            if assistant is not None and reads_images(assistant):
                counts = [len(image) for image in features.pooler_output]
                own = assistant_image_features(assistant, image_kwargs, counts)
                kwargs["mm_encoder_outputs"]["assistant_image"] = own
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if inputs is not None and not args and (self.memory is not None or self.reranker is not None):
            inputs, kwargs = None, {"input_ids": inputs, **kwargs}
        with_memory, with_reranker = self._ranks(use_memory, use_reranker, features, kwargs)
        if with_memory or with_reranker:
            return self._generate_ranked(*masked_patches(features, image_kwargs), with_memory, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size: int = 1, input_ids=None, **kwargs):
        # transformers repeats the image features of beams and of several returned sequences from 5.18 on
        outputs = kwargs.get("mm_encoder_outputs") or {}
        if "image" in outputs and expand_size > 1 and not hasattr(GenerationMixin, "_expand_multimodal_outputs"):
            by_ids = input_ids is not None and input_ids.numel() > 0
            mask = input_ids == self.config.image_token_id if by_ids else None
            mask = self.model._find_placeholders(kwargs["inputs_embeds"]) if mask is None else mask
            images, expanded = list(outputs["image"].pooler_output), []
            for count in mask.sum(dim=1).tolist():
                own: list[torch.Tensor] = []
                while sum(map(len, own)) < count:
                    own.append(images.pop(0))
                expanded += own * expand_size
            kwargs["mm_encoder_outputs"] = outputs | {"image": BliprenImageFeatures(pooler_output=expanded)}
        return super()._expand_inputs_for_generation(expand_size=expand_size, input_ids=input_ids, **kwargs)

    def _get_candidate_generator(self, *args, **kwargs):
        # transformers has no public way: it gives an assistant the token ids and image features of this model
        generator = super()._get_candidate_generator(*args, **kwargs)
        adapt_candidate_generator(generator, kwargs["input_ids"], self.config.image_token_id, kwargs["model_kwargs"])
        return generator

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """Prepare inputs as in transformers, with images if, and only if, the inputs have their placeholders.

        Versions before 5.20 always pass the images; later ones do not pass them to an assistant.
        """
        # generate takes inputs_embeds only if this signature names it
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        ids = inputs.get("input_ids")
        if kwargs.get("mm_encoder_outputs") and ids is not None:
            # a single token behind the prefill is a generated one
            is_prompt = ids.shape[1] > 1 or kwargs.get("is_first_iteration")
            tokens = {"image": self.config.image_token_id, "video": self.config.video_token_id}
            outputs = kwargs["mm_encoder_outputs"]
            shown = is_prompt and any(bool((ids == tokens[kind]).any()) for kind in tokens if kind in outputs)
            inputs["mm_encoder_outputs"] = outputs if shown else None
        return inputs

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | os.PathLike | list[str | os.PathLike],
        llm: str | os.PathLike,
        *,
        connector: str = "qformer",
        projector: str = "mlp",
        num_queries: int = 32,
        qformer: dict | None = None,
        qformer_init: str | os.PathLike | None = None,
        projector_options: dict | None = None,
        vision_feature_layer: int | list[int] = -1,
        vision_feature_select: str = "patches",
        scales: list[int] | None = None,
        scale_join: str = "channels",
        tiles: int | None = None,
        frames: int | None = None,
        frame_tokens: bool = False,
        time_embedding: str = "sinusoidal",
        image_processor_options: dict | None = None,
        match_embedding_scale: bool = True,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        **hub_kwargs,
    ) -> "BliprenForConditionalGeneration":
        r"""Connect a pretrained vision encoder and a pretrained language model by an untrained connector.

        Args:
            vision, llm: Hub ids (perhaps `id@revision`) or folders; two vision encoders are used side by side.
            connector, projector: see [`BliprenConfig`].
            num_queries: learned queries of the Q-Former.
            qformer: fields of [`BliprenQFormerConfig`].
            qformer_init: BERT or DistilBERT checkpoint that gives the Q-Former its sizes and first weights.
            projector_options: fields of [`BliprenConfig`] for the projector, such as `{"projector_hidden_size": 512}`.
            vision_feature_layer, vision_feature_select: see [`BliprenConfig`].
            scales, scale_join, tiles: `vision_scales`, `vision_join`, `vision_tiles` of [`BliprenConfig`].
            frames, frame_tokens: `num_frames` and `frame_tokens` of [`BliprenConfig`].
            time_embedding: of a Q-Former that reads all frames at once: `"sinusoidal"` or `"learned"`, by the place of
                a frame, or `"seconds"`.
            image_processor_options: settings of the image processor, such as `{"do_center_crop": False}`; those of a second
                encoder's under `second`.
            match_embedding_scale: scale image features to the root mean square of the language model's embeddings;
                otherwise they start many times larger.
            dtype: dtype of the frozen parts; the connector is in float32.
            attn_implementation: attention of vision encoder and language model, as in transformers.
            hub_kwargs: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: when a base model cannot be used: its weights are incomplete, it is of another kind, or the logits
                of the language model cannot be reproduced.
        """
        encoders = [vision] if isinstance(vision, (str, os.PathLike)) else list(vision)
        encoders = [split_revision(os.fspath(name)) for name in encoders]
        llm, llm_revision = split_revision(os.fspath(llm))
        for part, name, revision in (*(("vision", *encoder) for encoder in encoders), ("llm", llm, llm_revision)):
            raw, _ = PreTrainedConfig.get_config_dict(name, revision=revision, **hub_kwargs)
            load_base_code(part, raw, name, revision, **hub_kwargs)
        text_config = AutoConfig.from_pretrained(llm, revision=llm_revision, **hub_kwargs)
        if text_config.is_encoder_decoder:
            raise ValueError(
                f"{llm} is an encoder-decoder model ({text_config.model_type}); BLIPren takes decoder-only language models"
            )
        if text_config.get_text_config() is not text_config:
            raise ValueError(
                f"{llm} is a multimodal model ({text_config.model_type}); BLIPren takes text-only language models"
            )
        setup = load_vision_setup(
            vision,
            vision_feature_layer,
            vision_feature_select,
            scales,
            scale_join,
            tiles,
            image_processor_options,
            **hub_kwargs,
        )
        tokenizer = AutoTokenizer.from_pretrained(llm, revision=llm_revision, **hub_kwargs)
        first, second = setup.sources[0], (setup.sources[1] if len(setup.sources) == 2 else None)
        measured = first.shape
        qformer_values = {"num_query_tokens": num_queries, **(qformer or {})}
        bert = None
        if qformer_init is not None:
            bert_id, bert_revision = split_revision(os.fspath(qformer_init))
            bert = AutoModel.from_pretrained(bert_id, revision=bert_revision, dtype=torch.float32, **hub_kwargs)
            qformer_values = {
                "hidden_size": bert.config.hidden_size,
                "num_hidden_layers": bert.config.num_hidden_layers,
                "num_attention_heads": bert.config.num_attention_heads,
                "intermediate_size": getattr(bert.config, "intermediate_size", None) or bert.config.hidden_dim,
                "vocab_size": bert.config.vocab_size,
                "max_position_embeddings": bert.config.max_position_embeddings,
                **qformer_values,
            }
        qformer_values["encoder_hidden_size"] = setup.hidden_size
        if qformer_values.get("patch_position_embeddings"):
            qformer_values["num_patches"] = setup.num_patches
        if setup.num_pieces > 1:
            per_piece = measured.num_patches(vision_feature_select)
            qformer_values |= {"num_pieces": setup.num_pieces, "patches_per_piece": per_piece}
        if frames is not None:
            if setup.num_patches is None:
                raise ValueError(
                    "videos need as many patches of each frame: no tiles, and an encoder with a fixed grid"
                )
            if time_embedding == "seconds" and (frame_tokens or connector != "qformer"):
                raise ValueError(
                    "a time embedding by seconds needs a Q-Former that reads all frames at once: no frame_tokens, and the "
                    "connector `qformer`"
                )
            if not frame_tokens:
                qformer_values |= {"time_embedding": time_embedding, "num_frames": frames}
                qformer_values |= {"patches_per_frame": setup.num_patches}
        causal_lm, info = AutoModelForCausalLM.from_pretrained(
            llm, revision=llm_revision, dtype=dtype, output_loading_info=True, **hub_kwargs
        )
        _check_complete(llm, info["missing_keys"])
        vision_models = []
        for source in setup.sources:
            vision_model, info = AutoModel.from_pretrained(
                source.name,
                revision=source.revision,
                config=source.config,
                dtype=causal_lm.dtype,
                output_loading_info=True,
                **hub_kwargs,
            )
            if info["missing_keys"]:  # an unused pooler may be missing
                used = used_parameters(vision_model, source.image_inputs, vision_feature_layer)
                _check_complete(source.name, set(info["missing_keys"]) & used)
            vision_models.append(vision_model)
        references = {
            part: base_model_reference(source.name, source.revision, **hub_kwargs)
            for part, source in zip(("vision", "second_vision"), setup.sources)
        }
        config = BliprenConfig(
            vision_config=first.config,
            text_config=causal_lm.config,
            qformer_config=BliprenQFormerConfig(**qformer_values),
            connector=connector,
            projector=projector,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select=vision_feature_select,
            num_prefix_tokens=measured.num_prefix_tokens,
            vision_grid=list(measured.grid) if measured.grid else None,
            vision_hidden_size=setup.hidden_size,
            vision_scales=scales,
            vision_join=scale_join,
            vision_tiles=tiles,
            second_vision_config=second.config if second else None,
            second_num_prefix_tokens=second.shape.num_prefix_tokens if second else 0,
            second_vision_grid=list(second.shape.grid) if second else None,
            second_hidden_size=second.shape.hidden_size if second else None,
            num_frames=frames,
            frame_tokens=frame_tokens,
            video_token_id=pick_video_token(tokenizer)[1] if frames is not None else None,
            image_token_id=pick_image_token(tokenizer)[1],
            num_visual_tokens=num_queries if connector == "qformer" else setup.num_patches,
            base_models={**references, "llm": base_model_reference(llm, llm_revision, **hub_kwargs)},
            **(projector_options or {}),
        )
        config.dtype = causal_lm.dtype
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        model = cls(config)
        for name, vision_model in zip(("vision_tower", "second_vision_tower"), vision_models):
            copy_weights(getattr(model.model, name), vision_model)
        copy_weights(model.model.language_model, causal_lm.base_model)
        copy_weights(model.lm_head, causal_lm.get_output_embeddings())
        model.tie_weights()
        if bert is not None and model.model.qformer is not None:
            copied = copy_bert_weights(model.model.qformer, bert)
            logger.info("Q-Former: %d parameters copied from %s", len(copied), qformer_init)
        if match_embedding_scale:
            model._match_embedding_scale()
        pad = next(i for i in (tokenizer.pad_token_id, causal_lm.generation_config.pad_token_id, 0) if i is not None)
        ends = causal_lm.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        end = end_of_answer_id(tokenizer, [e for e in ends if e is not None])
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted({end, *(e for e in ends if e is not None)}),
            pad_token_id=pad,
            do_sample=False,
            max_new_tokens=64,
        )
        model.eval()
        model.freeze()
        model._check_text_logits(causal_lm, llm)
        return model

    @torch.no_grad()
    def _match_embedding_scale(self) -> None:
        """Scale the projector's last layer so that image features have the root mean square of embeddings."""
        embeddings = self.get_input_embeddings()
        ids = torch.arange(0, embeddings.weight.shape[0], max(1, embeddings.weight.shape[0] // 512))
        target = embeddings(ids.to(embeddings.weight.device)).float().square().mean().sqrt()
        projector = self.model.projector
        if isinstance(projector, BliprenMlp):
            projector.output_norm.weight.fill_(target)
        elif isinstance(projector, BliprenMoeProjector):
            for expert in projector.experts:
                expert.output_norm.weight.fill_(target)
        else:
            states = torch.randn(64, self.config.connector_hidden_size)
            last = projector if isinstance(projector, nn.Linear) else projector.fc2
            last.weight.mul_(target / projector(states).square().mean().sqrt())

    @torch.no_grad()
    def _check_text_logits(self, causal_lm: nn.Module, name: str) -> None:
        """Raise `ValueError` unless text logits equal the language model's own: some families have an unusual head."""
        ids = torch.arange(8, device=self.device)[None] % self.get_input_embeddings().weight.shape[0]
        ids = ids.masked_fill(ids == self.config.image_token_id, 0)
        own, expected = self(input_ids=ids).logits.float(), causal_lm.eval()(input_ids=ids).logits.float()
        if own.shape != expected.shape or not torch.allclose(
            own, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
        ):
            raise ValueError(
                f"language model {name} ({self.config.text_config.model_type}) computes its logits in a way that BLIPren "
                "does not support; use another language model"
            )


def _ship_other_files() -> None:
    """Make the remote-code loader copy two more files. This function is never called; the imports are read as text."""
    from .pipeline_blipren import BliprenImageToTextPipeline  # noqa: F401
    from .retrieval_blipren import BliprenForImageTextRetrieval  # noqa: F401


__all__ = [
    "BliprenForConditionalGeneration",
    "BliprenModel",
    "BliprenPreTrainedModel",
]
