"""A folder shaped like a checkpoint, without a model behind it: enough for everything that never loads it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

AUTO_MAP = {
    "AutoConfig": "configuration_blipren.BliprenConfig",
    "AutoModel": "modeling_blipren.BliprenForConditionalGeneration",
    "AutoProcessor": "processing_blipren.BliprenProcessor",
}


def write_checkpoint(
    folder: Path, bases: dict | None = None, kind: str = "full", seed: int = 0, shards: int = 1
) -> Path:
    """Writes the files that `blipren train` leaves, with random numbers for weights, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    names = ["model.qformer.query_tokens", "model.projector.fc1.weight", "model.vision_tower.a", "lm_head.weight"]
    weights = {name: generator.standard_normal((64, 512), dtype=np.float32) for name in names}
    for number in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({k: weights[k] for k in names[number::shards]}, folder / name, metadata={"format": "pt"})
    if shards > 1:
        where = {k: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, k in enumerate(names)}
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if bases is None:
        bases = {part: {"id": f"org/{part}", "revision": "a" * 40, "sha256": "0" * 64} for part in ("vision", "llm")}
    config = {
        "model_type": "blipren",
        "auto_map": AUTO_MAP,
        "connector": "qformer",
        "projector": "mlp",
        "num_visual_tokens": 32,
        "checkpoint_type": kind,
        "qformer_config": {"num_hidden_layers": 2},
        "vision_config": {"model_type": "siglip_vision_model", "_name_or_path": str(folder / "vision")},
        "text_config": {"model_type": "llama"},
        "base_models": bases,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "BliprenProcessor"}))
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"/home/someone/x": 0}}, "added_tokens": []})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(folder), "pad_token": "<pad>"}))
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 40}))
    (folder / "configuration_blipren.py").write_text("class BliprenConfig: ...\n")
    (folder / "modeling_blipren.py").write_text("from .configuration_blipren import BliprenConfig\n")
    (folder / "processing_blipren.py").write_text("class BliprenProcessor: ...\n")
    return folder


def write_run(folder: Path) -> Path:
    """Adds what a run leaves beside its checkpoint, among it everything that must not be published."""
    (folder / "settings.yaml").write_text("learning_rate: 0.0001\nbatch_size: 32\nllm_tuning: frozen\nseed: 7\n")
    rows = [
        {"kind": "train", "step": 10, "loss": 3.0, "seconds": 60.0},
        {"kind": "validation", "step": 20, "loss": 2.4},
        {"kind": "train", "step": 30, "loss": 2.5, "seconds": 180.0},
        {"kind": "validation", "step": 30, "loss": 2.6},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.json").write_text(json.dumps({"gpus": [], "threads": 2}))
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "curves.png")
    (folder / "training_args.bin").write_bytes(b"\x80\x04pickle")
    state = folder / "checkpoints" / "checkpoint-30"
    state.mkdir(parents=True)
    (state / "optimizer.pt").write_bytes(b"\x80\x04pickle")
    save_file({"a": np.zeros(3, np.float32)}, state / "model.safetensors")
    return folder


def write_evaluation(folder: Path, dataset: str = "org/photos") -> Path:
    """The folder of `blipren evaluate`."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "captioning": {"CIDEr": 0.3123, "BLEU-4": 0.11, "intervals": {"CIDEr": [0.29, 0.335]}, "images": 500},
        "hallucination": {"hallucinated_objects": 0.125, "intervals": {}, "truth": "scenes"},
        "vqa": {"accuracy": 0.5, "intervals": {}, "images": 500},
        "counts": {"images": 500},
        "dataset": dataset,
        "settings": {"num_beams": 3, "max_new_tokens": 30},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    for name in ("samples", "attention", "example"):
        Image.fromarray(np.full((20, 30, 3), 99, np.uint8)).save(folder / f"{name}.png")
    return folder
