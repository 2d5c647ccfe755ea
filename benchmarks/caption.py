"""Speed of `blipren caption DATASET --out`, against transformers' pipeline and `generate` on the same model and pictures.

    python benchmarks/caption.py --images 64 --batch-size 32 --out caption.json
    python benchmarks/caption.py --clock cpu --threads 1 --workers 0 --images 16 --batch-size 16     # on a shared machine
    python benchmarks/caption.py --shape tiny --photo-size 96 72 --images 20000 --broken-every 1000 --arms local --memory

SigLIP-B/16, a 12-layer Q-Former and a Llama of 135M parameters with random weights, drawn 640x480 JPEGs, float32 and greedy.
Random weights end no caption, so every arm has the same logits processor: it ends a caption after as many tokens as captions
of Flickr8k have, chosen by the caption's first token. Each arm is a process of its own and includes decoding the pictures,
but not loading the model. The arms:

- one_by_one: a loop over `pipeline("image-to-text")`. pipeline: the same with `batch_size`.
- generate: processor and `generate` on batches in the order of the files.
- local: `blipren caption --out`. local_cache: the same from a feature cache. local_prompts: with three prompts.
  local_plain: without packed weights. --parts prints where the time of these arms goes.
- vllm: `blipren caption --out --engine vllm`, if named: with the Python of --environment, behind `local`, with its lengths.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from embed import draw_photos
from parts.measure import resident
from parts.train_arms import SHAPES
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.data.sources.images import decode_image

ARMS = ("one_by_one", "pipeline", "generate", "local", "local_cache", "local_prompts", "local_plain", "vllm")
# tokens of the 12,500 captions of flickr8k-mini in the vocabulary of its language model, at even quantiles
LENGTHS = (6, 7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 14, 14, 15, 16, 17, 18, 19, 23)
TOWERS = Path(__file__).resolve().parents[1] / "training" / "quickstart" / "towers"
MAX_NEW_TOKENS = 30
CLOCK = "wall"


class EndLikePeople(LogitsProcessor):
    """Ends a caption after as many tokens as its first token chooses, and allows the words of the tokenizer only."""

    def __init__(self, prompt_length: int | None, end: int, words: int):
        self.prompt_length, self.end, self.words = prompt_length, end, words

    def __call__(self, input_ids, scores):
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        count = input_ids.shape[1] - self.prompt_length
        scores = scores.clone()
        scores[:, self.words :] = -torch.inf
        scores[:, self.end] = -torch.inf
        if count:
            first = input_ids[:, self.prompt_length]
            over = torch.tensor([count >= LENGTHS[int(token) % len(LENGTHS)] for token in first])
            scores[over] = -torch.inf
            scores[over, self.end] = 0
        return scores


def now() -> float:
    """Return seconds: of the wall, or with `--clock cpu` of the processor, of this process and its ended workers."""
    if CLOCK == "wall":
        return time.perf_counter()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def write_model(folder: Path, shape: str) -> Path:
    """Write a full checkpoint of a shape with random weights, which give different images different captions."""
    vision, qformer, llm, queries = SHAPES[shape]
    torch.manual_seed(0)
    config = SiglipVisionConfig(**vision, vision_use_head=False)
    AutoModel.from_config(config).save_pretrained(folder / "vision")
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    SiglipImageProcessorPil(size=size).save_pretrained(folder / "vision")
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "llm")
    tokenizer.save_pretrained(folder / "llm")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    values = llm | {"vocab_size": max(llm["vocab_size"], len(tokenizer) + 1)}
    AutoModelForCausalLM.from_config(LlamaConfig(**values, **ids)).save_pretrained(folder / "llm")
    bases = folder / "vision", folder / "llm"
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(*bases, qformer=qformer, num_queries=queries)
    for parameter in model.model.qformer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "model")
    BliprenProcessor.from_vision_text_pretrained(*bases, num_queries=queries).save_pretrained(folder / "model")
    return folder / "model"


def run_pipeline(model: Path, files: list[Path], batch_size: int) -> tuple[float, list[str]]:
    from transformers import pipeline

    caption = pipeline("image-to-text", model=str(model), trust_remote_code=True)
    tokenizer = caption.processor.tokenizer
    began, texts = now(), []
    for start in range(0, len(files), batch_size):
        ending = EndLikePeople(None, tokenizer.eos_token_id, len(tokenizer))
        options = {"logits_processor": LogitsProcessorList([ending]), "max_new_tokens": MAX_NEW_TOKENS}
        part = [str(file) for file in files[start : start + batch_size]]
        texts += [one[0]["generated_text"] for one in caption(part, batch_size=batch_size, generate_kwargs=options)]
    return now() - began, texts


def run_generate(model: Path, files: list[Path], batch_size: int) -> tuple[float, list[str]]:
    network = BliprenForConditionalGeneration.from_pretrained(model).eval()
    processor = BliprenProcessor.from_pretrained(model)
    tokenizer = processor.tokenizer
    began, texts = now(), []
    for start in range(0, len(files), batch_size):
        images = [decode_image(file.read_bytes()) for file in files[start : start + batch_size]]
        inputs = processor(images=images, text=None, return_tensors="pt")
        ending = EndLikePeople(inputs["input_ids"].shape[1], tokenizer.eos_token_id, len(tokenizer))
        found = network.generate(
            **inputs, logits_processor=LogitsProcessorList([ending]), max_new_tokens=MAX_NEW_TOKENS
        )
        texts += [processor.decode_answer(ids) for ids in found[:, inputs["input_ids"].shape[1] :]]
    return now() - began, texts


def end_as_local(llm, lengths: list[int], end: int, words: int) -> None:
    """Let vLLM give each picture as many of the tokenizer's tokens as `local` did, and the end in place of one more."""
    plain, left = llm.generate, iter(lengths)

    def generate(requests, params, **options):
        for one in params:
            one.max_tokens, one.ignore_eos = next(left) + 1, True
            one.allowed_token_ids = [word for word in range(words) if word != end]
        results = plain(requests, params, **options)
        for output in (result.outputs[0] for result in results):
            output.token_ids, output.finish_reason = [*output.token_ids[:-1], end], "stop"
        return results

    llm.generate = generate


def run_local(arm: str, model: Path, folder: Path, given) -> tuple[float, list[str], list[int]]:
    from blipren.training.captioning import job as captioning_job
    from blipren.training.captioning.decoder import Decoder
    from blipren.training.cli import main
    from blipren.training.commands.caption import CaptionSettings
    from blipren.training.engine.memory import keep_freed_memory

    class EndingDecoder(Decoder):
        def _processors(self, seeds, prompt_length):
            processors, noises = super()._processors(seeds, prompt_length)
            tokenizer = self.processor.tokenizer
            processors.append(EndLikePeople(prompt_length, tokenizer.eos_token_id, len(tokenizer)))
            return processors, noises

    keep_freed_memory()
    data = folder / "photos"
    if arm == "local_cache":
        if main(
            ["embed", str(model), str(data), str(folder / "cache"), "--device", "cpu", "--near-duplicates", "keep"]
        ):
            raise RuntimeError("the cache could not be made")
        data = folder / "cache"
    prompts = ["Short caption:", "What is in the picture?", "A long description of the picture:"]
    out = folder / "out" / arm
    settings = CaptionSettings(
        model=str(model),
        images=[str(data)],
        out=str(out),
        batch_size=given.batch_size,
        max_new_tokens=MAX_NEW_TOKENS,
        prompts=prompts if arm == "local_prompts" else [],
        device="cpu",
        workers=given.workers,
        keep_images=False,
        engine="vllm" if arm == "vllm" else "local",
    )
    if arm == "local_plain":
        captioning_job.pack_linears = lambda model: None
    job = captioning_job.CaptionJob.open(settings)
    if arm == "vllm":
        tokenizer, lengths = job.processor.tokenizer, json.loads((folder / "lengths.json").read_text())
        end_as_local(job.engine.llm, lengths, tokenizer.eos_token_id, len(tokenizer))
    else:
        job.engine.decoder.__class__ = EndingDecoder
    began = now()
    if given.memory:
        watch_memory(job)
    parts = time_parts(job) if given.parts else {}
    job.run(out)
    seconds = now() - began
    if parts:
        parts["everything else"] = seconds - sum(parts.values())
        print(
            {name: f"{1000 * value / job.source.num_rows:.0f} ms an image" for name, value in parts.items()},
            flush=True,
        )
    import datasets

    name = "caption_0" if arm == "local_prompts" else job.columns[0].name
    loaded = datasets.load_dataset(str(out), cache_dir=str(folder / "library"))
    rows = [row for split in loaded.values() for row in split]
    return seconds, [row[name] for row in rows], [row[f"{name}_num_tokens"] for row in rows]


def time_parts(job) -> dict[str, float]:
    """Return the seconds by part, counted while the job runs."""
    parts: dict[str, float] = {}

    def timed(name, function):
        def run(*args, **keywords):
            began = now()
            result = function(*args, **keywords)
            part = name(*args) if callable(name) else name
            parts[part] = parts.get(part, 0.0) + now() - began
            return result

        return run

    job.reader.features = timed("encoder", job.reader.features)
    job.model.get_image_features = timed("Q-Former", job.model.get_image_features)
    decoder = job.engine.decoder
    decoder._forward = timed(lambda ids, *more: "tokens" if ids.shape[1] == 1 else "prompt", decoder._forward)
    return parts


def watch_memory(job) -> None:
    """Print the resident memory at every tenth of the rows."""
    caption, done = job.caption, [0]

    def watched(rows, batch):
        result = caption(rows, batch)
        before, done[0] = done[0], done[0] + len(rows)
        step = max(1, job.source.num_rows // 10)
        if before // step != done[0] // step:
            print(f"memory after {done[0]:,} images: {resident('VmRSS') / 2**20:,.0f} MiB", flush=True)
        return result

    job.caption = watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="b16-135m")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, help="threads of torch; all cores by default")
    parser.add_argument("--workers", type=int, help="workers of the arms `local`; the command's default by default")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, on a shared machine"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS[:-1]))
    parser.add_argument("--environment", type=Path, help="with vLLM and our package, for the arm vllm")
    parser.add_argument("--photo-size", nargs=2, type=int, default=[640, 480], help="width and height")
    parser.add_argument("--broken-every", type=int, help="cut off each so many-th photo behind the first 256")
    parser.add_argument("--parts", action="store_true", help="print the time of the arms `local` by part")
    parser.add_argument("--memory", action="store_true", help="print the memory of the arm `local` on the way")
    parser.add_argument("--out")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    global CLOCK
    CLOCK = given.clock
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.arm:
        return run_arm(given)
    if "vllm" in given.arms and (given.environment is None or "local" not in given.arms):
        parser.error("the arm vllm needs --environment, and the arm local for the lengths of the captions")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "photos").mkdir()
        draw_photos(folder / "photos", min(given.images, 256), tuple(given.photo_size))
        with (folder / "photos" / "metadata.jsonl").open("a") as metadata:
            for number in range(256, given.images):  # the same photos under further names
                name = f"{number:05d}.jpg"
                photo = folder / "photos" / f"{number % 256:05d}.jpg"
                if given.broken_every and number % given.broken_every == 0:
                    (folder / "photos" / name).write_bytes(photo.read_bytes()[:500])
                else:
                    os.link(photo, folder / "photos" / name)
                metadata.write(json.dumps({"file_name": name, "caption": "a photo"}) + "\n")
        write_model(folder, given.shape)
        seconds: dict[str, list[float]] = {arm: [] for arm in given.arms}
        texts: dict[str, list[str]] = {}
        for round_number in range(given.rounds):
            for arm in given.arms:
                own = folder / f"round-{round_number}-{arm}"
                own.mkdir()
                for name in ("photos", "model", "vision", "llm", "lengths.json"):
                    (own / name).symlink_to(folder / name)
                python = str(given.environment / "bin" / "python") if arm == "vllm" else sys.executable
                command = [python, __file__, *sys.argv[1:], "--arm", arm, "--folder", str(own)]
                subprocess.run(command, check=True)
                result = json.loads((own / "result.json").read_text())
                seconds[arm].append(result["seconds"])
                texts[arm] = result["texts"]
                if arm == "local":
                    (folder / "lengths.json").write_text(json.dumps(result["lengths"]))
                print(f"{arm}: {result['seconds']:.1f} s, {given.images / result['seconds']:.2f} images/s", flush=True)
    rates = {arm: given.images / statistics.median(values) for arm, values in seconds.items()}
    best = rates.get("local")
    result = {
        "shape": given.shape,
        "images": given.images,
        "batch_size": given.batch_size,
        "threads": torch.get_num_threads(),
        "clock": given.clock,
        "seconds": seconds,
        "images_per_second": rates,
        "local_relative_to": {arm: best / rate for arm, rate in rates.items() if best},
        "captions_as_local": {
            arm: sum(a == b for a, b in zip(own, texts["local"])) / len(own) for arm, own in texts.items() if best
        },
    }
    print(
        json.dumps(
            {name: result[name] for name in ("images_per_second", "local_relative_to", "captions_as_local")}, indent=1
        )
    )
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=1) + "\n")


def run_arm(given) -> None:
    """Run one arm in this process and write its seconds and captions."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if given.threads:  # vLLM computes in this process, whose time is measured, with so many threads
        os.environ |= {"OMP_NUM_THREADS": str(given.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    files, model = sorted((given.folder / "photos").glob("*.jpg")), given.folder / "model"
    if given.arm in ("one_by_one", "pipeline"):
        found = run_pipeline(model, files, 1 if given.arm == "one_by_one" else given.batch_size)
    elif given.arm == "generate":
        found = run_generate(model, files, given.batch_size)
    else:
        found = run_local(given.arm, model, given.folder, given)
    result = dict(zip(("seconds", "texts", "lengths"), found))
    (given.folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
