"""`pipeline("image-to-text", model=..., trust_remote_code=True)`: an image in, `[{"generated_text": ...}]` out."""

from pathlib import Path

from transformers import GenerationConfig, Pipeline
from transformers.image_utils import load_image

from .image_blipren import check_image_sources


class BliprenImageToTextPipeline(Pipeline):
    """Caption images, or answer a prompt about them.

    transformers 5 redirects its own `image-to-text` to a task that needs text, so `custom_pipelines` in config.json names
    this class. With a model object, pass `pipeline_class=BliprenImageToTextPipeline`.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    # transformers' default of 256 new tokens would override the model's own setting
    _default_generation_config = GenerationConfig()

    def _sanitize_parameters(self, prompt=None, timeout=None, max_new_tokens=None, generate_kwargs=None):
        preprocess = {key: value for key, value in (("prompt", prompt), ("timeout", timeout)) if value is not None}
        forward = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            forward["max_new_tokens"] = max_new_tokens
        return preprocess, {"generate_kwargs": forward} if forward else {}, {}

    def __call__(self, inputs, **kwargs):
        """Return `[{"generated_text": str}]` for an image, a list of such lists for several.

        Args:
            inputs: a PIL image, path or URL; a list, generator or dataset of them.
            prompt (`str`, *optional*): replaces the model's caption prompt.
            max_new_tokens (`int`, *optional*), generate_kwargs (`dict`, *optional*): for `generate`.
            batch_size (`int`, *optional*): images in a batch.
        """
        return super().__call__(inputs, **kwargs)

    def preprocess(self, image, prompt=None, timeout=None):
        if isinstance(image, dict):  # a row of a dataset
            prompt, image = image.get("text", prompt), image["image"]
        check_image_sources(image)
        inputs = self.processor(images=load_image(image, timeout=timeout), text=prompt, return_tensors="pt")
        return inputs.to(dtype=self.dtype)

    def _forward(self, model_inputs, generate_kwargs=None):
        # settings given to pipeline(): newer versions of transformers keep them here, older ones in generation_config
        generate_kwargs = {**getattr(self, "_generate_kwargs", {}), **(generate_kwargs or {})}
        if hasattr(self, "generation_config"):
            generate_kwargs.setdefault("generation_config", self.generation_config)
        length = model_inputs["input_ids"].shape[1]
        sequences = self.model.generate(**model_inputs, **generate_kwargs)
        return {
            "new_ids": sequences[:, length:].reshape(
                model_inputs["input_ids"].shape[0], -1, sequences.shape[1] - length
            )
        }

    def postprocess(self, model_outputs):
        return [
            {"generated_text": self.processor.decode_answer(ids)} for ids in model_outputs["new_ids"].flatten(0, -2)
        ]

    def save_pretrained(self, save_directory, **kwargs):
        """Save model and processor; transformers' method does not save the processor."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
