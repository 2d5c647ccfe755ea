"""Tiny pairs of base models, made once a session."""

from pathlib import Path

import pytest
from tiny_models import QFORMER, make_llm, make_vision

from blipren import BliprenForConditionalGeneration, BliprenProcessor


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Function (kind, family, **values) -> folder of a tiny random base model, made once."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def make(kind: str, family: str, **values) -> Path:
        key = (kind, family, tuple(sorted(values.items())))
        if key not in made:
            maker = make_llm if kind == "llm" else make_vision
            made[key] = maker(root / f"{kind}-{family}-{len(made)}", family, **values)
        return made[key]

    return make


@pytest.fixture(scope="session")
def pair(bases):
    """Function (vision family, llm family, llm values, **options) -> fresh model and processor."""

    def make(vision: str = "siglip_vision_model", llm: str = "llama", llm_values: dict | None = None, **options):
        vision_folder, llm_folder = bases("vision", vision), bases("llm", llm, **(llm_values or {}))
        prompts = {key: options.pop(key) for key in ("prompts", "system_prompts") if key in options}
        connector = {key: options[key] for key in ("connector", "vision_feature_select") if key in options}
        model = BliprenForConditionalGeneration.from_vision_text_pretrained(
            vision_folder, llm_folder, num_queries=4, qformer=QFORMER, dtype="float32", **options
        )
        processor = BliprenProcessor.from_vision_text_pretrained(
            vision_folder, llm_folder, num_queries=4, **connector, **prompts
        )
        return model, processor

    return make
