"""Run in vLLM's own environment by prove.py: write the greedy tokens for the prompts of a task file."""

import json
import sys
from pathlib import Path

import numpy as np
import transformers
import vllm
from PIL import Image


def shown(path: str, fps: float | None) -> dict:
    """Return the image of a file, or the frames of a `.npy` file (with their rate), as vLLM takes them."""
    if not path.endswith(".npy"):
        return {"image": Image.open(path).convert("RGB")}
    frames = np.load(path)
    return {"video": frames if fps is None else (frames, {"fps": fps, "duration": len(frames) / fps})}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    engine = vllm.LLM(
        model=task["checkpoint"],
        trust_remote_code=True,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
    )
    settings = vllm.SamplingParams(temperature=0, max_tokens=task["max_tokens"], min_tokens=task["max_tokens"])
    prompts = [{"prompt": row["prompt"], "multi_modal_data": shown(row["shown"], row["fps"])} for row in task["rows"]]
    outputs = engine.generate(prompts, settings)
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "vllm": vllm.__version__,
        "transformers": transformers.__version__,
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
