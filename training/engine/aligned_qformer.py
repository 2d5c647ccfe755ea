"""The Q-Former of a checkpoint of `blipren align`, used with another language model."""

import dataclasses
from dataclasses import dataclass

from transformers import AutoImageProcessor, PreTrainedConfig

from blipren import BliprenForConditionalGeneration, BliprenForImageTextRetrieval, BliprenProcessor
from blipren.configuration_blipren import split_revision
from blipren.training.arguments import constructor_arguments
from blipren.training.commands.new import NewSettings
from blipren.training.engine.loading import load_checkpoint, load_config
from blipren.training.errors import UserError, one_line

QFORMER_SETTINGS = constructor_arguments("qformer_configuration_blipren.py", "BliprenQFormerConfig")
# not settings of the image processor, but facts about its class
_CLASS_FACTS = ("image_processor_type", "auto_map", "data_format")


def is_our_checkpoint(name: str) -> bool:
    """Return whether `name` (folder or Hub id, optionally with @revision) is a BLIPren checkpoint.

    Raises:
        UserError: there is no model.
    """
    model_id, revision = split_revision(name)
    try:
        return PreTrainedConfig.get_config_dict(model_id, revision=revision)[0].get("model_type") == "blipren"
    except (OSError, ValueError) as error:
        raise UserError(f"there is no model at {name}: {one_line(error)}") from error


@dataclass
class AlignedQFormer:
    """A checkpoint of `blipren align`: its model without language model, and its processor."""

    name: str
    model: BliprenForImageTextRetrieval
    processor: BliprenProcessor

    @classmethod
    def load(cls, name: str) -> "AlignedQFormer":
        """Load the checkpoint. Raises `UserError` if it is not one of `blipren align`, or does not say its encoder."""
        config = load_config(name)
        if "BliprenForImageTextRetrieval" not in (config.architectures or []):
            raise UserError(f"{name} is not a checkpoint of `blipren align`: its Q-Former has no trained text side")
        if not config.base_models:
            raise UserError(f"{name} does not say which vision encoder it was trained with (no base_models)")
        model, processor = load_checkpoint(name, BliprenForImageTextRetrieval)
        return cls(name, model, processor)

    def fill_settings(self, settings: NewSettings) -> NewSettings:
        """Return the settings with what the Q-Former was trained with: encoder, features, sizes.

        Raises:
            UserError: a setting was given another value; the message has both.
        """
        config = self.model.config
        layers = config.vision_feature_layer
        theirs = {
            "connector": "qformer",
            "queries": config.qformer_config.num_query_tokens,
            "vision_feature_layer": layers if isinstance(layers, list) else [layers],
            "vision_feature_select": config.vision_feature_select,
            "scales": config.vision_scales,
            "scale_join": config.vision_join,
            "tiles": config.vision_tiles,
            "frames": config.num_frames,
            "frame_tokens": config.frame_tokens,
            "time_embedding": config.qformer_config.time_embedding or "sinusoidal",
        }
        for field in dataclasses.fields(settings):
            if field.name in theirs:
                default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
                if (given := getattr(settings, field.name)) != default:
                    self._check(field.name, given, theirs[field.name])
        for name, given in settings.qformer.items():
            self._check(f"qformer {name}", given, getattr(config.qformer_config, name))
        bases = [config.base_models[part] for part in ("vision", "second_vision") if part in config.base_models]
        vision = settings.vision or [b["id"] + (f"@{b['revision']}" if b["revision"] else "") for b in bases]
        return dataclasses.replace(
            settings,
            vision=vision,
            **theirs,
            qformer={name: getattr(config.qformer_config, name) for name in QFORMER_SETTINGS},
            image_processor=self._image_processor_settings(vision[0]) | settings.image_processor,
        )

    def _check(self, name: str, given, theirs) -> None:
        if given != theirs:
            raise UserError(
                f"{name} is {given!r}, and {theirs!r} in {self.name}, which --qformer-init names: leave it out"
            )

    def _image_processor_settings(self, vision: str) -> dict:
        """Return the settings of the checkpoint's image processor that are not the encoder's own."""
        model_id, revision = split_revision(vision)
        own = AutoImageProcessor.from_pretrained(model_id, revision=revision).to_dict()
        theirs = self.processor.image_processor.to_dict()
        pieces = ("scales", "tiles", "tile_patches", "second")  # of the settings with these names
        return {k: v for k, v in theirs.items() if own.get(k) != v and k not in (*_CLASS_FACTS, *pieces)}

    def give_to(
        self, generator: BliprenForConditionalGeneration, processor: BliprenProcessor
    ) -> BliprenForImageTextRetrieval:
        """Return the model that `blipren align` would have written with the language model of `generator`.

        Encoder, language model's facts and projector are the generator's; Q-Former, text side and heads those of this
        checkpoint. `processor` gets the tokenizer of the text side.

        Raises:
            UserError: the generator's vision encoder or preprocessing is another one; the message has the difference.
        """
        for part in ("vision", "second_vision"):
            trained, given = (model.config.base_models.get(part) for model in (self.model, generator))
            self._check("number of vision encoders", 1 + bool(given), 1 + bool(trained))
            if trained and trained["sha256"] != given["sha256"]:
                raise UserError(
                    f"the Q-Former of {self.name} reads features of {trained['id']} (weights {trained['sha256'][:12]}), "
                    f"and {given['id']} has other weights ({given['sha256'][:12]}): take the same vision encoder, or run "
                    "`blipren align` with this one"
                )
        ours, theirs = processor.image_processor.to_dict(), self.processor.image_processor.to_dict()
        for name in (ours.keys() | theirs.keys()) - set(_CLASS_FACTS):
            self._check(f"image_processor {name}", ours.get(name), theirs.get(name))
        config = self.model.config
        model = BliprenForImageTextRetrieval.from_generator(
            generator, None, config.image_text_hidden_size, config.itc_pooling
        )
        other = ("model.vision_tower.", "model.second_vision_tower.", "model.projector.")
        weights = {k: v for k, v in self.model.state_dict().items() if not k.startswith(other)}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.startswith(other) for name in missing)
        model.config.trained_heads = config.trained_heads
        processor.qformer_tokenizer = self.processor.qformer_tokenizer
        return model
