"""Load the model and processor of a checkpoint that is named on the command line, for every command."""

from pathlib import Path

from blipren import BliprenConfig, BliprenForConditionalGeneration, BliprenProcessor
from blipren.base_blipren import BliprenPreTrainedModel
from blipren.base_models_blipren import hash_weights, weight_files
from blipren.training.checkpoint_config import check_model_type, read_config
from blipren.training.errors import UserError, one_line


def load_config(path: str) -> BliprenConfig:
    """Return the config of a checkpoint folder or Hub id. Raises `UserError` if it is not one of BLIPren."""
    if Path(path).exists():
        return BliprenConfig.from_dict(read_config(Path(path)))
    try:
        raw, _ = BliprenConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no checkpoint at {path}: it is neither a folder here nor a model on the Hub ({one_line(error)})"
        ) from error
    check_model_type(path, raw)
    return BliprenConfig.from_dict(raw)


def model_fingerprint(path: str) -> str:
    """Return a hash of a checkpoint's weights (of samples of large ones), whatever the name of its folder."""
    return hash_weights(weight_files(path), sampled=True)[:16]


def load_processor(path: str) -> BliprenProcessor:
    """Return the processor of a checkpoint. Raises `UserError` that says why it does not load."""
    load_config(path)
    try:
        return BliprenProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not load: {one_line(error)}") from error


def load_checkpoint(
    path: str, model_class: type[BliprenPreTrainedModel] = BliprenForConditionalGeneration, **kwargs
) -> tuple[BliprenPreTrainedModel, BliprenProcessor]:
    """Return the model (in eval mode, frozen but for the connector) and the processor of a checkpoint.

    Args:
        path: folder or Hub id.
        model_class: class to load it as.
        kwargs: for the model's `from_pretrained`, such as `dtype`.

    Raises:
        UserError: one line that says what is wrong with it.
    """
    load_config(path)
    try:
        model = model_class.from_pretrained(path, **kwargs)
        processor = BliprenProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not load: {one_line(error)}") from error
    if processor.image_token_id != model.config.image_token_id or (
        processor.num_visual_tokens != model.config.num_visual_tokens
    ):
        raise UserError(
            f"{path}: the processor is of another checkpoint: its placeholder is {processor.image_token_id} x "
            f"{processor.num_visual_tokens}, the model's {model.config.image_token_id} x {model.config.num_visual_tokens}"
        )
    return model.eval(), processor
