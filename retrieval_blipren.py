"""Image-text retrieval with the Q-Former of stage 1: contrast, matching, generation (BLIP-2, arXiv 2301.12597)."""

import copy
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Blip2ForImageTextRetrieval, Blip2VisionConfig, Blip2VisionModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from .base_blipren import BliprenPreTrainedModel
from .configuration_blipren import BliprenConfig
from .projector_blipren import build_projector
from .qformer_blipren import BliprenQFormer
from .qformer_configuration_blipren import BliprenQFormerConfig
from .qformer_weights_blipren import copy_blip2_weights

# transformers has this encoder, but AutoModel does not know its class
AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)

TEMPERATURE = 0.07  # initial value of BLIP-2


@dataclass
class BliprenImageTextOutput(ModelOutput):
    """
    Args:
        logits_per_image (`torch.Tensor` of shape `(images, texts)`, *optional*): cosine similarities (`"itc"`).
        logits_per_text (`torch.Tensor` of shape `(texts, images)`, *optional*): their transpose.
        image_embeds (`torch.Tensor` of shape `(images, num_queries, image_text_hidden_size)`, *optional*): of norm 1.
        text_embeds (`torch.Tensor` of shape `(texts, image_text_hidden_size)`, *optional*): of norm 1.
        logits (`torch.Tensor`, *optional*): `(batch, 2)` for no match and match (`"itm"`); of the next tokens
            `(batch, text_length, vocab_size)` or `(tokens, vocab_size)` (`"itg"`).
    """

    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class BliprenTextHead(nn.Module):
    """Language-modelling head of BERT; the output matrix is the word embeddings, passed to `forward`."""

    def __init__(self, config: BliprenQFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor, word_embeddings: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(self.activation(self.dense(hidden_states))), word_embeddings, self.bias)


class BliprenImageTextModel(BliprenPreTrainedModel):
    """Vision encoder and Q-Former under their names in `BliprenForConditionalGeneration`.

    It has the projector, frozen and unused, so that a checkpoint keeps it for the next stage.
    """

    def __init__(self, config: BliprenConfig):
        super().__init__(config)
        text = config.text_config.get_text_config()
        self.vision_tower = AutoModel.from_config(config.vision_config)
        if config.second_vision_config is not None:
            self.second_vision_tower = AutoModel.from_config(config.second_vision_config)
        self.qformer = BliprenQFormer(config.qformer_config)
        self.projector = build_projector(config, getattr(text, "word_embed_proj_dim", None) or text.hidden_size)
        self.post_init()


class BliprenForImageTextRetrieval(BliprenPreTrainedModel):
    """Image-text retrieval: embeddings to compare (ITC), matching head to re-rank (ITM), generation head (ITG).

    `config.text_config` and `config.base_models` name the language model that the next stage trains with.
    """

    main_input_name = "pixel_values"
    _keep_in_fp32_modules_strict = (
        "qformer projector vision_proj text_proj itm_head text_head logit_scale logit_bias".split()
    )
    _base_parts = ("vision", "second_vision")

    def __init__(self, config: BliprenConfig):
        super().__init__(config)
        if not config.qformer_config.use_text:
            raise ValueError(
                "image-text retrieval needs a Q-Former with a text side (qformer_config.use_text): make one with "
                "BliprenForImageTextRetrieval.from_generator, or with `blipren align`"
            )
        width = config.qformer_config.hidden_size
        self.model = BliprenImageTextModel(config)
        self.vision_proj = nn.Linear(width, config.image_text_hidden_size)
        self.text_proj = nn.Linear(width, config.image_text_hidden_size)
        self.itm_head = nn.Linear(width, 2)
        self.text_head = BliprenTextHead(config.qformer_config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))  # log of 1 / temperature
        self.logit_bias = nn.Parameter(torch.tensor(0.0))  # used by the sigmoid loss only
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen parts; what is trained is in float32."""
        return self.model.vision_tower.dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BliprenForImageTextRetrieval):
            init.constant_(module.logit_scale, math.log(1 / TEMPERATURE))
            init.zeros_(module.logit_bias)
        elif isinstance(module, BliprenTextHead):
            init.zeros_(module.bias)

    def parts(self) -> dict[str, nn.Module]:
        heads = nn.ModuleDict(
            {name: getattr(self, name) for name in ("vision_proj", "text_proj", "itm_head", "text_head")}
        )
        heads.register_parameter("logit_scale", self.logit_scale)
        heads.register_parameter("logit_bias", self.logit_bias)
        return super().parts() | {"heads": heads}

    def freeze(self, train: tuple[str, ...] | list[str] = ("qformer", "heads")) -> None:
        super().freeze(train)

    def _write_code_and_maps(self, save_directory: str | os.PathLike) -> None:
        super()._write_code_and_maps(save_directory)
        # a checkpoint without language model has no auto class and no pipeline for text generation
        del self.config.custom_pipelines
        self.config.auto_map = {
            "AutoConfig": "configuration_blipren.BliprenConfig",
            "AutoModel": "retrieval_blipren.BliprenForImageTextRetrieval",
            "AutoProcessor": "processing_blipren.BliprenProcessor",
        }

    def get_input_embeddings(self) -> nn.Module:
        return self.model.qformer.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.qformer.word_embeddings = value

    # ---- embeddings -----------------------------------------------------------------------------------------------

    def _patches(
        self,
        pixel_values,
        patch_features,
        patch_attention_mask,
        pixel_attention_mask,
        spatial_shapes,
        second_pixel_values,
    ):
        if (pixel_values is None) == (patch_features is None):
            raise ValueError("give pixel_values or patch_features, one of them")
        if patch_features is None:
            patch_features = self.encode_images(
                pixel_values, pixel_attention_mask, spatial_shapes, second_pixel_values
            )
            patch_attention_mask = pixel_attention_mask if patch_attention_mask is None else patch_attention_mask
        return {"patch_features": patch_features, "patch_attention_mask": patch_attention_mask}

    def get_image_embeddings(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        patch_attention_mask: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        second_pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute image embeddings `(num_images, num_queries, image_text_hidden_size)`, each of norm 1."""
        patches = self._patches(
            pixel_values,
            patch_features,
            patch_attention_mask,
            pixel_attention_mask,
            spatial_shapes,
            second_pixel_values,
        )
        return F.normalize(self.vision_proj(self.model.qformer(**patches).query_states), dim=-1)

    def get_text_embeddings(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute text embeddings `(num_texts, image_text_hidden_size)` of norm 1, from the first token."""
        states = self.model.qformer(input_ids=input_ids, text_attention_mask=attention_mask).text_states
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def similarity(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Compute cosine similarities `(images, texts)`, pooled over queries by `config.itc_pooling`.

        Raises:
            ValueError: outside of training, when the contrast was never trained.
        """
        if not self.training:
            self.config.check_trained_heads("contrast")
        if self.config.itc_pooling == "mean":
            return F.normalize(image_embeds.mean(1), dim=-1) @ text_embeds.T
        return torch.einsum("iqd,td->itq", image_embeds, text_embeds).amax(-1)

    # ---- forward --------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        patch_attention_mask: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        second_pixel_values: torch.Tensor | None = None,
        objective: str = "itc",
        logits_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BliprenImageTextOutput:
        r"""Compute the outputs of one of the three objectives.

        Args:
            input_ids: `(batch, text_length)` of the Q-Former's own tokenizer, right-padded.
            attention_mask: `(batch, text_length)`, 1 for text and 0 for padding.
            pixel_values: `(num_images, channels, height, width)`.
            patch_features: `(num_images, num_patches, vision_hidden)`, instead of `pixel_values`.
            patch_attention_mask: `(num_images, num_patches)`, 1 for patches and 0 for padding.
            pixel_attention_mask, spatial_shapes, second_pixel_values: as in [`encode_images`].
            objective: `"itc"` compares every image with every text; `"itm"` says whether image i matches text i; `"itg"`
                predicts each next token of text i from image i and the text before it.
            logits_mask: `(batch, text_length)`, for `"itg"`: compute logits at these positions only.

        Raises:
            ValueError: without text, without images or with both kinds of them, for another objective, or, outside of
                training, for one whose head was never trained.
        """
        if input_ids is None:
            raise ValueError(
                "image-text retrieval needs input_ids: the text in tokens of the Q-Former's own tokenizer"
            )
        patches = self._patches(
            pixel_values,
            patch_features,
            patch_attention_mask,
            pixel_attention_mask,
            spatial_shapes,
            second_pixel_values,
        )
        if objective == "itc":
            image_embeds = self.get_image_embeddings(**patches)
            text_embeds = self.get_text_embeddings(input_ids, attention_mask)
            logits = self.similarity(image_embeds, text_embeds)
            return BliprenImageTextOutput(
                logits_per_image=logits, logits_per_text=logits.T, image_embeds=image_embeds, text_embeds=text_embeds
            )
        if objective == "itm":
            if not self.training:
                self.config.check_trained_heads("matching")
            states = self.model.qformer(
                **patches, input_ids=input_ids, text_attention_mask=attention_mask, attention_pattern="bidirectional"
            ).query_states
            return BliprenImageTextOutput(logits=self.itm_head(states).mean(1))
        if objective == "itg":
            if not self.training:
                self.config.check_trained_heads("generation")
            start = self.config.qformer_config.decoder_start_token_id
            if start is not None:
                input_ids = torch.cat([torch.full_like(input_ids[:, :1], start), input_ids[:, 1:]], dim=1)
            states = self.model.qformer(
                **patches, input_ids=input_ids, text_attention_mask=attention_mask, attention_pattern="causal"
            ).text_states
            states = states if logits_mask is None else states[logits_mask.bool()]
            return BliprenImageTextOutput(logits=self.text_head(states, self.get_input_embeddings().weight))
        raise ValueError(f"objective is {objective!r}; it must be 'itc', 'itm' or 'itg'")

    # ---- construction from other models ---------------------------------------------------------------------------

    @classmethod
    def from_generator(
        cls,
        generator: BliprenPreTrainedModel,
        text: dict | None = None,
        image_text_hidden_size: int = 256,
        itc_pooling: str = "max",
    ) -> "BliprenForImageTextRetrieval":
        """Make a retrieval model from vision encoder and Q-Former of a generation model; its heads are random.

        Args:
            generator: `BliprenForConditionalGeneration` with a Q-Former; the vision encoder is shared, not copied.
            text: `vocab_size`, `pad_token_id`, `decoder_start_token_id`, `max_position_embeddings` of a random text
                side, for a Q-Former that has none.
            image_text_hidden_size, itc_pooling: see [`BliprenConfig`].

        Raises:
            ValueError: when the model has no Q-Former.
        """
        if generator.config.connector != "qformer":
            raise ValueError(
                f"image-text retrieval needs a Q-Former, and the connector of this model is {generator.config.connector!r}"
            )
        config = copy.deepcopy(generator.config)
        config.image_text_hidden_size, config.itc_pooling = image_text_hidden_size, itc_pooling
        config.trained_heads = []
        had_text = config.qformer_config.use_text
        config.qformer_config = BliprenQFormerConfig(
            **{**config.qformer_config.to_dict(), "use_text": True, **({} if had_text else text or {})}
        )
        model = cls(config)  # in float32, whatever dtype the frozen parts have
        missing, unexpected = model.model.qformer.load_state_dict(generator.model.qformer.state_dict(), strict=False)
        text_side = ("word_embeddings", "position_embeddings", "text_feed_forward")
        lost = unexpected + [name for name in missing if had_text or not any(part in name for part in text_side)]
        if lost:
            raise ValueError(f"the weights of the Q-Former do not fit: {lost[0]!r} is missing or unexpected")
        model.model.vision_tower = generator.model.vision_tower
        if config.second_vision_config is not None:
            model.model.second_vision_tower = generator.model.second_vision_tower
        model.model.projector.load_state_dict(generator.model.projector.state_dict())
        model.freeze()
        return model

    @classmethod
    @torch.no_grad()
    def from_blip2(cls, source: Blip2ForImageTextRetrieval) -> "BliprenForImageTextRetrieval":
        """Copy a BLIP-2 retrieval model of transformers, such as `Salesforce/blip2-itm-vit-g`.

        Contrast and matching scores are equal. The generation head is random and the temperature has its initial value,
        since such a checkpoint has neither.
        """
        source_config = source.config
        names = (
            "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob "
            "attention_probs_dropout_prob layer_norm_eps initializer_range cross_attention_frequency "
            "encoder_hidden_size vocab_size max_position_embeddings pad_token_id"
        ).split()
        qformer = BliprenQFormerConfig(
            **{name: getattr(source_config.qformer_config, name) for name in names},
            num_query_tokens=source_config.num_query_tokens,
            use_text=True,
        )
        vision = copy.deepcopy(source_config.vision_config)
        side = vision.image_size // vision.patch_size
        config = BliprenConfig(
            vision_config=vision,
            text_config=copy.deepcopy(source_config.text_config),
            qformer_config=qformer,
            projector="linear",  # as in BLIP-2
            vision_feature_select="full",  # the Q-Former of BLIP-2 reads the class token
            num_prefix_tokens=1,
            vision_grid=[side, side],
            vision_hidden_size=vision.hidden_size,
            image_text_hidden_size=source_config.image_text_hidden_size,
            trained_heads=["contrast", "matching"],
        )
        model = cls._from_config(config)
        copy_blip2_weights(model.model.qformer, source.state_dict())
        model.model.vision_tower.load_state_dict(source.vision_model.state_dict())
        model.vision_proj.load_state_dict(source.vision_projection.state_dict())
        model.text_proj.load_state_dict(source.text_projection.state_dict())
        model.itm_head.load_state_dict(source.itm_head.state_dict())
        model.freeze()
        return model.eval()


__all__ = ["BliprenForImageTextRetrieval", "BliprenImageTextModel", "BliprenImageTextOutput"]
