"""`import blipren` is light, and afterwards every public name and every auto class finds our classes."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import blipren

SOURCE = Path(blipren.__file__)


def run(code: str, *arguments) -> str:
    """Standard output of a fresh Python process with our package installed."""
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SOURCE.parent.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_transformers():
    assert run("import sys, blipren; print({'torch', 'transformers'} & set(sys.modules))") == "set()"


def test_every_public_name_resolves():
    code = "import blipren; print(*[getattr(blipren, n).__name__ for n in blipren.__all__], sep=',')"
    assert run(code).split(",") == blipren.__all__
    star = "from blipren import *; print(*[n for n in dir() if n.startswith('Blipren')], sep=',')"
    assert run(star).split(",") == blipren.__all__
    assert set(blipren.__all__) <= set(dir(blipren))
    with pytest.raises(AttributeError, match="no attribute 'BliprenNothing'"):
        _ = blipren.BliprenNothing


def test_type_checkers_see_the_same_names():
    """The imports under TYPE_CHECKING are those of _NAMES, each with `as`, which makes it public in a typed package."""
    block = next(n for n in ast.parse(SOURCE.read_text()).body if isinstance(n, ast.If))
    assert block.test.id == "TYPE_CHECKING"
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {(file, name) for file, names in blipren._NAMES.items() for name in names}
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)
    assert (SOURCE.parent / "py.typed").is_file()


USE = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

full, retrieval = sys.argv[1:]
found = [
    AutoConfig.from_pretrained(full),
    AutoModel.from_pretrained(full),
    AutoModelForImageTextToText.from_pretrained(full),
    AutoModelForMultimodalLM.from_pretrained(full),
    AutoProcessor.from_pretrained(full),
    AutoModel.from_pretrained(retrieval),
]
print(*[type(each).__module__ + "." + type(each).__name__ for each in found], sep=",")
"""
FIRST = {
    "ours": "import blipren",
    "a name of ours": "from blipren import BliprenProcessor",
    "the retrieval model": "import blipren.retrieval_blipren",
    "all of transformers": "import transformers.models.auto.modeling_auto, transformers.models.auto.processing_auto\n"
    "from transformers import AutoProcessor, Trainer\nimport blipren",
    "the config of transformers": "from transformers import AutoConfig\nimport blipren",
    "the tokenizers": "import blipren\nfrom transformers import AutoTokenizer",
    "the trainer": "import blipren\nfrom transformers import Trainer",
    "the pipelines": "import blipren\nfrom transformers import pipeline",
    "generation": "import blipren\nimport transformers.generation.utils",
}


@pytest.fixture(scope="module")
def checkpoints(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model, processor = pair()
    model.save_pretrained(folder / "full")
    processor.save_pretrained(folder / "full")
    text = {"vocab_size": 50, "pad_token_id": 0}
    blipren.BliprenForImageTextRetrieval.from_generator(model, text=text).save_pretrained(folder / "retrieval")
    return folder / "full", folder / "retrieval"


@pytest.mark.parametrize("first", FIRST)
def test_auto_classes_find_our_classes_in_every_order_of_imports(first, checkpoints):
    assert run(f"{FIRST[first]}\n{USE}", *checkpoints).split(",") == [
        "blipren.configuration_blipren.BliprenConfig",
        "blipren.modeling_blipren.BliprenForConditionalGeneration",
        "blipren.modeling_blipren.BliprenForConditionalGeneration",
        "blipren.modeling_blipren.BliprenForConditionalGeneration",
        "blipren.processing_blipren.BliprenProcessor",
        "blipren.retrieval_blipren.BliprenForImageTextRetrieval",
    ]


def test_model_files_import_each_other_without_a_circle():
    graph = {
        path.stem: {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1
        }
        for path in SOURCE.parent.glob("*_blipren.py")
    }
    assert len(graph) > 10
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
