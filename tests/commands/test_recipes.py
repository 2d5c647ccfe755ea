"""Every recipe, loaded as the commands load it, through new, embed, align and train on tiny stand-ins of its families;
and the ancestors' sizes, counted without making them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertTokenizerFast, DistilBertConfig, DistilBertModel

import blipren
from blipren import BliprenConfig, BliprenQFormer, BliprenQFormerConfig
from blipren.projector_blipren import build_projector
from blipren.training.cli import build_settings, load_recipe, settings_class
from blipren.training.commands.caption import run as caption
from blipren.training.commands.embed import run as embed
from blipren.training.commands.new import run as new
from blipren.training.stages.align import align
from blipren.training.stages.train import train
from tests import tiny_models
from tests.stages.tools import draw_dataset, events

RECIPES = sorted(p.stem for p in (Path(blipren.__file__).parent / "training" / "recipes").glob("*.yaml"))
OWN_TESTS = {r for r in RECIPES if r.startswith("quickstart")}  # drawn worlds; the default one has a test of its own
FLICKR = ["flickr8k-mini-words", "flickr8k-mini"]  # two runs in this order
TUNED = ["flickr8k-mini-lora", "flickr8k-mini-full"]  # each a run from the first of them
COCO = ["coco-mini-boxes"]
VISION = {
    "google/siglip-base-patch16-224": "siglip_vision_model",
    "google/siglip-so400m-patch14-384": "siglip_vision_model",
    "google/siglip-so400m-patch14-224": "siglip_vision_model",
    "facebook/dinov3-vitl16-pretrain-lvd1689m": "dinov3_vit",
    "facebook/dinov2-base": "dinov2",
    "google/vit-base-patch16-224": "vit",
    "google/vit-large-patch16-224": "vit",
    "tiny-vision": "mobilenet_v2",
    "training/quickstart/towers/vision": "siglip_vision_model",
}
THINK = tiny_models.CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
LLM = {  # id -> family, chat template
    "HuggingFaceTB/SmolLM-135M-Instruct": ("llama", tiny_models.CHATML),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", tiny_models.CHATML),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("llama", tiny_models.CHATML),
    "HuggingFaceTB/SmolLM-360M": ("llama", None),
    "meta-llama/Llama-3.2-1B": ("llama", None),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", tiny_models.CHATML),
    "Qwen/Qwen3-0.6B": ("qwen3", tiny_models.CHATML),
    "PleIAs/Baguettotron": ("llama", THINK),
    "caption-lm": ("llama", None),
    "training/quickstart/towers/llm": ("llama", None),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Function from a Hub id of a recipe to a tiny model of its family."""
    folder = tmp_path_factory.mktemp("stand-ins")

    def make(model_id: str) -> str:
        place = folder / model_id.replace("/", "--")
        if place.exists():
            return str(place)
        if model_id in VISION:
            tiny_models.make_vision(place, VISION[model_id])
        elif model_id in ("distilbert-base-uncased", "bert-base-uncased"):
            torch.manual_seed(0)
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red green blue circle square the is .".split()]
            place.mkdir()
            (place / "vocab.txt").write_text("\n".join(words))
            BertTokenizerFast(vocab_file=str(place / "vocab.txt")).save_pretrained(place)
            config = DistilBertConfig(vocab_size=len(words), dim=32, n_layers=6, n_heads=4, hidden_dim=64)
            DistilBertModel(config).save_pretrained(place)
        else:
            family, template = LLM[model_id]
            tiny_models.make_llm(place, family, chat=template is not None)
            if template == THINK:
                tokenizer = tiny_models.make_tokenizer(chat=True)
                tokenizer.chat_template = THINK
                tokenizer.save_pretrained(place)
        return str(place)

    return make


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The same pictures as animations: each turns black."""
    folder = draw_dataset(tmp_path_factory.mktemp("recipe-clips") / "clips", images=42)
    for file in folder.glob("*.png"):
        with Image.open(file) as picture:
            picture.save(file.with_suffix(".gif"), save_all=True, append_images=[Image.new("RGB", (32, 32))])
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace(".png", ".gif"))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("recipe-data") / "shapes", images=42)


def shrunk(qformer: dict) -> dict:
    """A Q-Former's settings with its depth and layout kept and its widths made small."""
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return qformer | {name: value for name, value in small.items() if name in qformer}


def recipe_settings(command, recipe, flags):
    settings = build_settings(command, flags, recipe)
    told = load_recipe(recipe).get(command, {})
    for name, value in told.items():  # what the recipe says arrives, unless the test overrides it
        assert name in flags or getattr(settings, name) == value
    return settings


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in (*OWN_TESTS, *FLICKR, *TUNED, *COCO)])
def test_recipe_runs_two_steps(recipe, stand_ins, pictures, clips, tmp_path):
    sections = load_recipe(recipe)
    wanted = sections["new"]
    pictures = clips if "frames" in wanted else pictures
    model, cache, out = (str(tmp_path / name) for name in ("model", "cache", "out"))
    vision = wanted["vision"] if isinstance(wanted["vision"], list) else [wanted["vision"]]
    flags = {"out": model, "vision": [stand_ins(name) for name in vision], "llm": stand_ins(wanted["llm"])}
    if "qformer_init" in wanted:
        flags["qformer_init"] = stand_ins(wanted["qformer_init"])
    if "qformer" in wanted:
        flags["qformer"] = shrunk(wanted["qformer"])
    if "projector_hidden_size" in wanted.get("projector_options", {}):
        flags["projector_options"] = wanted["projector_options"] | {"projector_hidden_size": 64}
    assert not new(recipe_settings("new", recipe, flags))
    embed(recipe_settings("embed", recipe, {"model": model, "dataset": str(pictures), "cache": cache, "workers": 0}))
    if "align" in sections:
        aligned = str(tmp_path / "aligned")
        tokenizer = {} if "qformer_init" in wanted else {"tokenizer": stand_ins("distilbert-base-uncased")}
        assert not align(
            recipe_settings(
                "align", recipe, {"model": model, "cache": cache, "out": aligned, "max_steps": 2} | tokenizer
            )
        )
        model = aligned
    start = model
    run = {"model": model, "cache": cache, "out": out, "max_steps": 2, "batch_size": 8, "device": "cpu"}
    run |= {"workers": 0, "generate_samples": 1, "max_new_tokens": 3, "warmup": 0.0, "log_every": 1}
    settings = recipe_settings("train", recipe, run)
    assert train(settings) == 0
    assert [e["step"] for e in events(Path(out), "train")] == [1, 2]
    for file in ("config.json", "finished.json", "model.safetensors"):
        assert (Path(out) / file).is_file()
    if "caption" in sections:  # of its own captions one is kept, and trained on beside people's
        own = str(tmp_path / "own")
        flags = {"model": out, "images": [str(pictures)], "out": own, "matching_model": start, "max_new_tokens": 4}
        flags |= {"filter": {"min_matching_score": 0.0}, "workers": 0, "device": "cpu"}
        assert not caption(recipe_settings("caption", recipe, flags))
        flags = {"model": start, "dataset": own, "cache": f"{own}-cache", "caption_columns": ["caption"], "workers": 0}
        assert not embed(recipe_settings("embed", recipe, flags | {"validation_share": 0.0, "test_share": 0.0}))
        run |= {"model": start, "cache": f"{cache}=3,{own}-cache=1", "out": str(tmp_path / "second")}
        assert train(recipe_settings("train", recipe, run)) == 0


@pytest.mark.parametrize("recipes", [[*FLICKR, *TUNED], COCO], ids=lambda names: names[-1])
def test_photos_run_two_steps_of_each_of_their_runs(recipes, pictures, tmp_path):
    """On stand-ins of its own families: MobileNetV2 with three of its layers, and a Llama."""
    vision = tiny_models.make_vision(tmp_path / "vision", "mobilenet_v2")
    llm = tiny_models.make_llm(tmp_path / "llm")
    model, cache = str(tmp_path / "model"), str(tmp_path / "cache")
    small = {"image_processor": {"do_center_crop": False, "size": {"height": 64, "width": 64}}}
    first = next(name for name in recipes if "new" in load_recipe(name))
    small["qformer"] = shrunk(load_recipe(first)["new"]["qformer"])
    bases = {"out": model, "vision": str(vision), "llm": str(llm)}
    assert not new(recipe_settings("new", first, bases | small))
    source = {"model": model, "dataset": str(pictures), "cache": cache, "workers": 0}
    assert not embed(recipe_settings("embed", first, source))
    for recipe in recipes:
        out = tmp_path / recipe
        start = str(tmp_path / FLICKR[0]) if recipe in TUNED else model
        run = {"model": start, "cache": cache, "out": str(out), "max_steps": 2, "batch_size": 8, "warmup": 0.0}
        run |= {"eval_every": 2, "device": "cpu", "generate_samples": 0, "max_new_tokens": 3, "log_every": 1}
        assert train(recipe_settings("train", recipe, run)) == 0
        assert [e["step"] for e in events(out, "train")] == [1, 2]
        model = str(out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_names_only_known_settings(recipe):
    sections = load_recipe(recipe)
    for command, values in sections.items():
        positionals = dict.fromkeys(("out", "model", "cache", "dataset"), "x") | {"images": ["x"]}
        if command == "new":
            positionals |= {name: values.get(name, "x") for name in ("vision", "llm")}
        names = {f.name for f in dataclasses.fields(settings_class(command))}
        build_settings(command, {k: v for k, v in positionals.items() if k in names}, recipe)
        assert set(values) <= names


# ---- the ancestors, DESIGN's table of what they are ----------------------------------------------------------------

SIGLIP_SO400M = {"model_type": "siglip_vision_model", "hidden_size": 1152, "vision_use_head": False}
SIZES = {
    # recipe: (vision width, LLM width, Q-Former extras, millions in the Q-Former, in the projector)
    "blipren-normal": (1152, 2048, {}, 539.6, 33.6),
    "blipren-moe": (1152, 2048, {}, 539.6, 135),
    "two-stage-tutorial": (
        768,
        576,
        {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30522, "use_text": True},
        87.7,
        0.8,
    ),
    "minimal-notebook": (1024, 960, {}, None, 1.9),
}


@pytest.mark.parametrize("recipe", SIZES)
def test_ancestors_have_their_sizes(recipe):
    vision_width, llm_width, extras, qformer_millions, projector_millions = SIZES[recipe]
    wanted = load_recipe(recipe)["new"]
    qformer = BliprenQFormerConfig(
        encoder_hidden_size=vision_width,
        num_query_tokens=wanted.get("queries", 32),
        **extras | wanted.get("qformer", {}),
    )
    config = BliprenConfig(
        vision_config=SIGLIP_SO400M | {"hidden_size": vision_width},
        qformer_config=qformer,
        connector=wanted["connector"],
        projector=wanted["projector"],
        vision_hidden_size=vision_width,
        **wanted.get("projector_options", {}),
    )
    with torch.device("meta"):
        projector = build_projector(config, llm_width)
        body = BliprenQFormer(qformer) if wanted["connector"] == "qformer" else None
    millions = sum(p.numel() for p in projector.parameters()) / 1e6
    assert millions == pytest.approx(projector_millions, rel=0.04)
    if body is not None:
        assert sum(p.numel() for p in body.parameters()) / 1e6 == pytest.approx(qformer_millions, rel=0.005)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_takes_its_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file

    folder = Path(blipren.__file__).parent / "training" / "recipes" / "accelerate"
    config = load_config_from_file(str(folder / f"{name}.yaml"))
    assert config.num_processes == 2 and config.distributed_type.value == "MULTI_GPU"
