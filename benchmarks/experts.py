"""The mixture-of-experts projector against an MLP with as many parameters, and with as much arithmetic.

    python benchmarks/experts.py --data scenes flickr8k-mini --flickr8k-mini DATASET --vision ENCODER --llm LLM \\
        --seeds 0 1 --jobs 8 --work FOLDER --out experts.json

Seven arms: `moe dense`, `moe top 2` and `moe top 1` (experts mixed per image; each as wide as the default mlp), and `mlp`
with the parameters of `moe`, and with the arithmetic of each of the three (the widths are computed). The router has few
operations, since it sees an image once, and many parameters where the encoder is wide.

Each arm is made and trained from the recipe (quickstart for the drawn scenes; flickr8k-mini without its experiments), for
equal steps on one shared feature cache, and evaluated on the validation split. The report has, for each arm, parameters
and arithmetic of the projector, and for each seed the figures of captions and answers, the validation loss, and the
experts' shares on the validation images. An arm that is finished in FOLDER is not repeated.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
from pathlib import Path

import torch

from blipren import BliprenConfig, BliprenForConditionalGeneration
from blipren.projector_blipren import build_projector
from blipren.training.cli import build_settings, load_recipe, run_command
from blipren.training.data.cache import FeatureCache
from blipren.training.engine import flops
from blipren.training.files import write_atomically
from blipren.training.quickstart.scenes import Split, write_scenes
from blipren.training.quickstart.steps import TOWERS

EXPERTS = 4
ARMS = (
    "moe dense",
    "moe top 2",
    "moe top 1",
    "mlp, parameters",
    "mlp, arithmetic of dense",
    "mlp, arithmetic of top 2",
    "mlp, arithmetic of top 1",
)
RECIPES = {"scenes": "quickstart", "flickr8k-mini": "flickr8k-mini"}
TASKS = {"scenes": ["captioning", "vqa"], "flickr8k-mini": ["captioning"]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=RECIPES, default=["scenes"])
    parser.add_argument("--flickr8k-mini", help="data set, as `blipren embed` takes it")
    parser.add_argument("--vision", help="encoder of flickr8k-mini")
    parser.add_argument("--llm", help="language model of flickr8k-mini")
    parser.add_argument("--scenes", type=int, default=3000, help="scenes to train on")
    parser.add_argument("--validation-scenes", type=int, default=300, help="half of them with unseen combinations")
    parser.add_argument("--steps", type=int, help="steps of every arm; by default the recipe's")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="arms that train at the same time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of an arm")
    parser.add_argument("--work", default="experts", help="folder that keeps everything")
    parser.add_argument("--out", default="experts.json")
    options = parser.parse_args()
    if "flickr8k-mini" in options.data and not (options.flickr8k_mini and options.vision and options.llm):
        parser.error("flickr8k-mini needs --flickr8k-mini, --vision and --llm")
    return options


def run_step(command: str, recipe: str, **values) -> None:
    """Run a command with a section of the recipe and these values over it."""
    status = run_command(command, build_settings(command, values, recipe))
    if status:
        raise SystemExit(f"blipren {command} ended with status {status}")


# ---- sizes ----------------------------------------------------------------------------------------------------------


def projector_size(config: BliprenConfig, out_size: int, **changes) -> tuple[int, int]:
    """Return parameters, and FLOPs an image forward, of a projector with some values of its config changed."""
    config = BliprenConfig(**config.to_dict() | changes)
    projector = build_projector(config, out_size).eval()
    queries = torch.zeros(1, config.num_visual_tokens or 16, config.connector_hidden_size)
    patches = torch.zeros(1, 1, config.vision_hidden_size)
    inputs = (queries, patches, None) if config.projector == "moe" else (queries,)
    with torch.no_grad():
        operations = flops.count(lambda: projector(*inputs))
    return sum(p.numel() for p in projector.parameters()), operations


def projector_of(arm: str, config: BliprenConfig, out_size: int) -> tuple[str, dict]:
    """Return the projector of an arm, and its options. Both sizes of an mlp grow linearly with its hidden width."""
    options = {"projector_dropout": 0.0}  # the experts have none
    top_k = {"moe top 2": 2, "mlp, arithmetic of top 2": 2, "moe top 1": 1, "mlp, arithmetic of top 1": 1}.get(arm)
    experts = {"num_experts": EXPERTS} | ({} if top_k is None else {"experts_top_k": top_k})
    if arm.startswith("moe"):
        return "moe", options | experts
    which = 0 if arm == "mlp, parameters" else 1
    wanted = projector_size(config, out_size, projector="moe", **experts)[which]
    one, two = (projector_size(config, out_size, projector="mlp", projector_hidden_size=w)[which] for w in (64, 128))
    width = 64 + round((wanted - one) / ((two - one) / 64))
    return "mlp", options | {"projector_hidden_size": width}


# ---- one arm --------------------------------------------------------------------------------------------------------


def expert_shares(model: BliprenForConditionalGeneration, cache: FeatureCache) -> dict:
    """Return how the router shares the validation images out among the experts.

    Returns:
        `mean`, each expert's mean probability; `first`, the share of images that it is the first choice of; `entropy`,
        that of an image's probabilities, 1 for an even mixture.
    """
    count = cache.num_rows("validation")
    found = []
    with torch.no_grad():
        for start in range(0, count, 64):
            features, mask = cache.patch_features("validation", list(range(start, min(start + 64, count))))
            found.append(model.get_image_features(patch_features=features, patch_attention_mask=mask).router_probs)
    probabilities = torch.cat(found).double()
    experts = probabilities.shape[1]
    first = torch.bincount(probabilities.argmax(dim=1), minlength=experts) / count
    entropy = torch.special.entr(probabilities).sum(dim=1).mean() / math.log(experts)
    return {"mean": probabilities.mean(dim=0).tolist(), "first": first.tolist(), "entropy": entropy.item()}


def run_arm(data: str, arm: str, seed: int, options: argparse.Namespace) -> dict:
    """Make, train and evaluate one arm. Its result is kept in the work folder, and read from there the next time."""
    torch.set_num_threads(options.threads)
    place = Path(options.work) / data
    folder = place / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    recipe, cache, dataset = RECIPES[data], place / "cache", dataset_of(data, options)
    vision, llm = bases_of(data, options)
    shape = BliprenForConditionalGeneration.from_pretrained(place / "shape")
    width = shape.get_input_embeddings().weight.shape[1]
    projector, projector_options = projector_of(arm, shape.config, width)
    parameters, operations = projector_size(shape.config, width, projector=projector, **projector_options)
    start, run = folder / "new", folder / "run"
    if not start.exists():
        run_step(
            "new", recipe, out=str(start), vision=vision, llm=llm, seed=seed, projector=projector,
            projector_options=projector_options,
        )  # fmt: skip
    section = load_recipe(recipe)["train"]
    values = {"model": str(start), "cache": str(cache), "out": str(run), "seed": seed, "device": options.device}
    values |= {"generate_samples": 0, "experiments": {}}
    if options.steps:
        values |= {"max_steps": options.steps, "eval_every": min(section["eval_every"], options.steps)}
    run_step("train", recipe, **values)
    run_step(
        "evaluate", recipe, model=str(run), dataset=dataset, out=str(folder / "results"), split="validation",
        tasks=TASKS[data], probe=False, report=False, meteor=False, device=options.device, run=str(run),
    )  # fmt: skip

    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    train = [event for event in events if event["kind"] == "train"]
    losses = [event["loss"] for event in events if event["kind"] == "validation"]
    metrics = json.loads((folder / "results" / "metrics.json").read_text())
    result = {
        "seed": seed,
        "projector": {"kind": projector, **projector_options},
        "parameters": parameters,
        "flops_an_image": operations,
        "flops_a_token_of_the_step": train[-1]["tflops"] * 1e12 / train[-1]["tokens_per_second"],
        "steps": json.loads((run / "finished.json").read_text())["steps"],
        "seconds": train[-1]["seconds"],
        "validation_loss": {"last": losses[-1], "best": min(losses)},
        "figures": {task: {k: v for k, v in metrics[task].items() if isinstance(v, float)} for task in TASKS[data]},
    }
    if "hallucination" in metrics:
        result["figures"]["hallucination"] = metrics["hallucination"]
    if projector == "moe":
        model = BliprenForConditionalGeneration.from_pretrained(run).eval()
        result["experts"] = expert_shares(model, FeatureCache.open(cache))
    write_atomically(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result


# ---- all of them ----------------------------------------------------------------------------------------------------


def dataset_of(data: str, options: argparse.Namespace) -> str:
    """Return the data set of `embed` and `evaluate`."""
    return options.flickr8k_mini if data == "flickr8k-mini" else str(Path(options.work) / data / "images")


def bases_of(data: str, options: argparse.Namespace) -> tuple[str, str]:
    """Return vision encoder and language model."""
    return (options.vision, options.llm) if data == "flickr8k-mini" else (str(TOWERS / "vision"), str(TOWERS / "llm"))


def prepare(data: str, options: argparse.Namespace) -> None:
    """Draw the scenes, make a checkpoint that tells the widths, and embed the data set, where it is not done yet."""
    place = Path(options.work) / data
    place.mkdir(parents=True, exist_ok=True)
    if data == "scenes" and not (place / "images" / "metadata.jsonl").is_file():
        half = options.validation_scenes // 2
        splits = (Split("train", "seen", options.scenes), Split("validation", "seen", half))
        write_scenes(place / "images", 0, (*splits, Split("validation", "unseen", half)))
    vision, llm = bases_of(data, options)
    if not (place / "shape").exists():
        run_step("new", RECIPES[data], out=str(place / "shape"), vision=vision, llm=llm)
    run_step(
        "embed", RECIPES[data], model=str(place / "shape"), dataset=dataset_of(data, options),
        cache=str(place / "cache"), device=options.device, workers=0,
    )  # fmt: skip


def summarize(results: list[dict]) -> dict:
    """Return an arm's sizes, its seeds, and the means over them."""
    first = results[0]
    figures = [
        {f"{task} {name}": value for task, values in result["figures"].items() for name, value in values.items()}
        | {f"validation loss, {name}": value for name, value in result["validation_loss"].items()}
        for result in results
    ]
    names = [name for name in figures[0] if all(isinstance(found.get(name), float) for found in figures)]
    return {
        "parameters": first["parameters"],
        "flops_an_image": first["flops_an_image"],
        "mean": {name: sum(found[name] for found in figures) / len(figures) for name in names},
        "range": {name: [min(f[name] for f in figures), max(f[name] for f in figures)] for name in names},
        "seeds": results,
    }


def main() -> None:
    options = arguments()
    for data in options.data:
        prepare(data, options)
    tasks = [(data, arm, seed) for data in options.data for seed in options.seeds for arm in options.arms]
    results: dict[tuple, dict] = {}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_arm, *task, options): task for task in tasks}
        for finished in concurrent.futures.as_completed(running):
            results[running[finished]] = finished.result()
            print(f"{running[finished]}: {json.dumps(results[running[finished]]['validation_loss'])}", flush=True)
    report = {
        "settings": vars(options),
        "machine": {"threads_an_arm": options.threads, "torch": torch.__version__},
        "data": {
            data: {arm: summarize([results[data, arm, seed] for seed in options.seeds]) for arm in options.arms}
            for data in options.data
        },
    }
    write_atomically(Path(options.out), json.dumps(report, indent=1) + "\n")
    for data, arms in report["data"].items():
        for arm, found in arms.items():
            captions = found["mean"]["captioning CIDEr"]
            loss = found["mean"]["validation loss, best"]
            sizes = f"{found['parameters']:,} parameters  {found['flops_an_image']:,} FLOPs an image"
            print(f"{data}  {arm:<26} {sizes}  CIDEr {captions:.3f}  loss {loss:.4f}")
    print(options.out)


if __name__ == "__main__":
    main()
