"""Every command and example of docs/ is run on tiny models, or, where that cannot be, parsed; what is not run has a reason.

The examples of a page run in order, in a copy of one folder with drawn photos, a trained model, its cache and its
evaluation. Base models of the Hub are replaced by the quickstart's towers. Only sizes and steps are reduced, by flags
behind a command.
"""

import dataclasses
import io
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, Blip2Config, Blip2ForImageTextRetrieval

from blipren.training import cli
from blipren.training.quickstart.clips import write_clips
from blipren.training.quickstart.scenes import Scene, Split, draw_scene, iterate_rows

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TOWERS = ROOT / "training" / "quickstart" / "towers"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "hooks" not in path.parts)
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)

# start of a command of blipren that is parsed only -> reason
PARSED = {
    "blipren doctor": "tests/test_readme.py and tests/doctor run it",
    "blipren push": "needs a Hub: tests/test_readme.py and tests/hub/test_publish.py run it against one on loopback",
    "blipren chat": "reads lines of a user: tests/conversation runs it",
    "blipren demo": "serves a page until it is stopped: tests/demo looks at it in a browser",
    "blipren import": "needs weights of others: tests/hub/test_import_weights.py imports small ones",
    "blipren new model --config flickr8k-mini": "tests/commands/test_recipes.py runs this recipe at small size",
    "blipren embed model flickr8k-mini": "the same recipe",
    "blipren train model cache words": "the same recipe",
    "blipren train words cache out": "the same recipe",
    "blipren evaluate out flickr8k-mini": "the same recipe",
    "blipren new model --config coco-mini-boxes": "tests/commands/test_recipes.py runs this recipe at small size",
    "blipren embed model coco-mini": "the same recipe",
    "blipren train model cache out --config coco-mini-boxes": "the same recipe",
    "blipren evaluate out coco-mini": "the same recipe",
    "blipren embed my-vlm user/dataset": "needs the Hub",
    'blipren embed my-vlm "s3://': "needs an object store: tests/data runs --engine ray on local files",
    "blipren caption run photos --out captioned-ray": "tests/captioning/test_ray.py runs the Ray engine",
    "blipren caption full photos --out captioned-vllm": "needs vLLM: tests/with_vllm/prove_captions.py runs it",
    "blipren quickstart --world": "minutes: tests/quickstart runs each world at small size",
    "blipren embed boxes-out/": "takes the scenes of that world",
    "blipren train boxes-out/": "the same scenes",
    "blipren evaluate plain boxes-out/": "the same scenes",
    "blipren grpo boxes-out/": "takes the model of that world",
    "blipren new vqa-model --config easy-vqa": "tests/commands/test_recipes.py runs this recipe at small size",
    "blipren embed vqa-model easy-vqa": "the same recipe",
    "blipren train vqa-model vqa-cache": "the same recipe",
    "blipren evaluate vqa easy-vqa": "the same recipe",
    "torchrun": "needs several processes or machines: tests/stages/test_processes.py runs them",
    "accelerate launch": "needs GPUs: tests/stages/test_processes.py runs this file",
}
# start of another program's command -> reason why it is not run
OTHER_PROGRAMS = {
    "pip install": "needs a package index",
    "hf auth login": "needs the Hub",
    "export BLIPREN_TRUST_BASE_CODE": "tests/remote_code/test_base_code.py sets it",
    "pipx install": "needs a package index",
    "python scripts/download_": "needs the network: tests/scripts/test_downloads.py runs it on loopback",
    "BLIPREN_IMAGES=data transformers serve": "tests/remote_code/test_serve.py runs it",
    "vllm serve": "needs vLLM: tests/with_vllm/prove.py runs it",
    "python scripts/easy_vqa.py": "needs the archive: tests/evaluation/test_easy_vqa.py runs it",
    "lmms-eval": "needs the network: tests/evaluation runs the plugin",
    "pytest": "minutes, on request",
    "python tests/": "needs a package index",
}
SERVED = "http://127.0.0.1:8000"  # a Python example with it needs a running server: tests/remote_code/test_serve.py
SMALL = {
    "embed": ["--workers", "0"],
    "align": ["--max-steps", "2", "--batch-size", "8", "--eval-every", "2"],
    "train": ["--max-steps", "2", "--batch-size", "8", "--eval-every", "2", "--max-new-tokens", "6"],
    "dpo": ["--max-steps", "2", "--batch-size", "4"],
    "grpo": ["--max-steps", "1", "--batch-size", "2", "--num-generations", "2", "--max-completion-length", "4"],
    "evaluate": ["--limit", "4", "--resamples", "20", "--max-new-tokens", "6", "--attention-images", "1"],
    "caption": ["--max-new-tokens", "6"],
    "search": ["--workers", "0"],
    "reranker": ["--max-steps", "2"],
}
QFORMER = "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}"
FOREIGN_FLAGS = {"--help", "--config", "--node-rank", "--allowed-media-domains", "--revision"} | {
    "--allowed-local-media-path", "--tensor-parallel-size", "--data-parallel-size", "--include_path", "--encoder", "--environment",
    "--media-io-kwargs", "--ray",
}  # fmt: skip


def small_command(line: str) -> list[str]:
    """Return the arguments of a `blipren` line with the base models replaced and sizes and steps reduced."""
    command, *rest = shlex.split(line, comments=True)[1:]
    if command != "new":
        return [command, *rest, *SMALL.get(command, [])]
    text = ["--llm", str(TOWERS / "llm")]
    if "aligned" in rest:  # encoder and sizes are those of the aligned checkpoint
        return [command, *rest, *text]
    size = ["--qformer-init", "bert"] if "--qformer-init" in rest else ["--qformer", QFORMER]
    return [command, *rest, *text, "--vision", str(TOWERS / "vision"), "--queries", "4", *size]


def commands(block: str) -> list[str]:
    """Return the commands of a shell block, each on one line. A quoted argument may span lines."""
    found, open_lines = [], ""
    for line in block.replace("\\\n", " ").splitlines():
        open_lines += line + "\n"
        try:
            shlex.split(open_lines, comments=True)
        except ValueError:  # a quotation is not closed yet
            continue
        found.append(open_lines.strip())
        open_lines = ""
    assert not open_lines, block
    return [line for line in found if line]


def reason(line: str, table: dict[str, str]) -> str | None:
    return next((why for start, why in table.items() if line.startswith(start)), None)


def parse(line: str, monkeypatch) -> None:
    """Build the settings of a line by the command line's own parser: a renamed flag, choice or recipe fails."""
    words = shlex.split(line, comments=True)
    start = words.index("blipren.training.cli" if "blipren.training.cli" in words else "blipren")
    built = []
    with monkeypatch.context() as patch:
        patch.setattr(cli, "run_command", lambda name, settings: built.append(settings) or 0)
        assert cli.main(words[start + 1 :]) == 0, line
    assert len(built) == 1
    for word in words:
        if word.startswith("training/"):
            assert (ROOT / word).is_file(), word


def run(line: str) -> None:
    """Run a line in this process, in place of an earlier result of the same name."""
    arguments = small_command(line)
    places = {"embed": 3, "align": 3, "train": 3, "dpo": 3, "grpo": 3, "evaluate": 3, "new": 1, "convert": 2}
    out = arguments[places[arguments[0]]] if arguments[0] in places else ""
    if "--verify" not in arguments and "--dry-run" not in arguments and out and Path(out).is_dir():
        shutil.rmtree(out)
    assert cli.main(arguments) == 0, line


def write_tar(folder: Path) -> None:
    """Write drawn photos as a WebDataset tar, as img2dataset does."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for index, row in enumerate(iterate_rows(1, (Split("train", "seen", 12),))):
            picture = io.BytesIO()
            draw_scene(Scene.from_json(row["scene"])).save(picture, "PNG")
            fields = {"caption": row["captions"][0], "short_caption": row["captions"][0], "status": "success"}
            parts = {
                "png": picture.getvalue(),
                "txt": row["captions"][0].encode(),
                "json": json.dumps(fields).encode(),
            }
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{index:05}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_pairs(photos: Path, folder: Path) -> None:
    """Write preferences about the photos: a caption of each against one of the next."""
    shutil.copytree(photos, folder)
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [
        {"file_name": row["file_name"], "split": row["split"], "prompt": "What is shown?"}
        | {"chosen": row["captions"][0], "rejected": other["captions"][0]}
        for row, other in zip(rows, rows[1:] + rows[:1])
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")


def write_llava(photos: Path, folder: Path) -> None:
    """Write conversations about the photos as LLaVA-Instruct has them: one JSON list beside the images."""
    shutil.copytree(photos / "images", folder / "images")
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    conversations = []
    for row in rows:
        texts = [text for pair in zip(row["questions"][:2], row["answers"]) for text in pair]
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        image = row["file_name"].removeprefix("images/")
        conversations.append({"id": image, "image": image, "conversations": turns, "split": row["split"]})
    (folder / "instruct.json").write_text(json.dumps(conversations), encoding="utf-8")


def write_bert(folder: Path) -> None:
    """Write a tiny BERT with its WordPiece tokenizer."""
    folder.mkdir()
    words = "a red green blue circle square triangle above below left right of the is and ."
    names = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]
    (folder / "vocab.txt").write_text("\n".join(names))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(names), **sizes)).save_pretrained(folder)


def write_blip2(folder: Path) -> None:
    """Write a tiny BLIP-2 retrieval model."""
    small = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    qformer = {**small, "encoder_hidden_size": 32, "vocab_size": 50, "use_qformer_text_input": True}
    text = {**small, "model_type": "opt", "ffn_dim": 16, "vocab_size": 50, "word_embed_proj_dim": 32}
    vision = {**small, "image_size": 28, "patch_size": 14}
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, image_text_hidden_size=12)
    Blip2ForImageTextRetrieval(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with what the pages start from: photos, a trained and an aligned model, cache and evaluation."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "photos" / "images").mkdir(parents=True)
    splits = (Split("train", "seen", 24), Split("validation", "seen", 8), Split("test", "unseen", 8))
    with (folder / "photos" / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number, row in enumerate(iterate_rows(0, splits), start=1):
            row["file_name"] = f"images/{number:04}.png"
            draw_scene(Scene.from_json(row["scene"])).save(folder / "photos" / row["file_name"])
            metadata.write(json.dumps(row) + "\n")
    shutil.copytree(folder / "photos", folder / "scenes")
    write_pairs(folder / "photos", folder / "pairs")
    write_llava(folder / "photos", folder / "llava")
    for name in ("tars", "livis/tars", "cc3m/tars"):
        write_tar(folder / name)
    torch.manual_seed(0)
    write_clips(folder / "clips", 0, {"train": 12, "validation": 3, "test": 3})
    write_bert(folder / "bert")
    write_blip2(folder / "blip2-itm-vit-g")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("blipren new my-vlm --qformer-init bert")
        run("blipren embed my-vlm photos cache")
        run("blipren align my-vlm cache aligned")
        run("blipren train aligned cache run")
        run("blipren evaluate run photos report")
    shutil.copytree(folder / "report", folder / "report-lora")
    predictions = (folder / "report" / "predictions.jsonl").read_text().splitlines()
    (folder / "captions.jsonl").write_text("\n".join(predictions))
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page(page, prepared, tmp_path, monkeypatch):
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    if not blocks:
        return
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "copy"))
    for language, block in blocks:
        if language == "python":
            program = compile(block, page, "exec")
            if SERVED not in block:
                text = re.sub(r'"google/[\w.-]+"', repr(str(TOWERS / "vision")), block)
                text = re.sub(r'"HuggingFaceTB/[\w.-]+"', repr(str(TOWERS / "llm")), text)
                text = text.replace("Salesforce/", "").replace("num_queries=32", "num_queries=4")
                program = compile(text, page, "exec")
                exec(program, {"__name__": "__main__"})
            continue
        for line in commands(block):
            if reason(line, OTHER_PROGRAMS):
                continue
            parse(line, monkeypatch)
            if not reason(line, PARSED):
                run(line)


def test_every_reason_is_used():
    """An entry whose command has left the docs goes too, and so does one that hides a command of blipren."""
    texts = [(DOCS / page).read_text(encoding="utf-8") for page in PAGES]
    lines = [
        line
        for text in texts
        for language, block in BLOCK.findall(text)
        if language == "bash"
        for line in commands(block)
    ]
    for start in [*PARSED, *OTHER_PROGRAMS]:
        assert any(line.startswith(start) for line in lines), start
    assert not [line for line in lines if line.startswith("blipren") and reason(line, OTHER_PROGRAMS)]


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_exist(page):
    known = set(FOREIGN_FLAGS)
    for name in cli.command_names():
        for field in dataclasses.fields(cli.settings_class(name)):
            flag = field.name.replace("_", "-")
            known |= {f"--{flag}", f"--no-{flag}"}
    text = BLOCK.sub("", (DOCS / page).read_text(encoding="utf-8"))
    for code in re.findall(r"`([^`\n]+)`", text):
        if code.startswith(("python benchmarks/", "python tests/")):  # flags of their own
            continue
        for flag in re.findall(r"(?<![\w-])--[\w-]+", code):
            assert flag in known, f"{page}: {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("http") or ((DOCS / page).parent / target).exists(), target
    for path in re.findall(r"`((?:training|tests|benchmarks)/[\w./-]+)", text):
        assert (ROOT / path).exists(), path
