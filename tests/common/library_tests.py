"""transformers' test mixins for the installed version, imported from its source distribution.

The source is taken from BLIPREN_TRANSFORMERS_SOURCE (an unpacked source distribution, or a git checkout, which also has
the generation mixin), otherwise from a cache folder that `pip download` fills once. Some modules that the mixins import
are not in the source distribution and are replaced:

* `generation.test_utils`: an empty `GenerationTesterMixin`. `test_generation_tester_mixin_inheritance`, which only
  requires that it is inherited, is then expected to fail; generation has tests of our own.
* `exporters.test_export`: an empty `ExportTesterMixin`, whose tests export every model with every exporter.
* `fetch_hub_objects_for_ci` (in `utils/`) returns the addresses of pictures unchanged; the chat template tests, which
  would download them, get a local picture instead.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import types
from functools import cache
from pathlib import Path

PACKAGE = "transformers_own_tests"


class Unavailable(Exception):
    """transformers' own tests cannot be run; the message says why."""


@cache
def source_folder() -> Path:
    """Return the folder with the source of the installed transformers version. Raises `Unavailable`."""
    given = os.environ.get("BLIPREN_TRANSFORMERS_SOURCE")
    if given:
        if not (Path(given) / "tests" / "test_modeling_common.py").is_file():
            raise Unavailable(f"BLIPREN_TRANSFORMERS_SOURCE={given} has no tests/test_modeling_common.py")
        return Path(given)
    version = importlib.metadata.version("transformers")
    cached = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blipren"
    folder = cached / f"transformers-{version}"
    if (folder / "tests" / "test_modeling_common.py").is_file():
        return folder
    cached.mkdir(parents=True, exist_ok=True)
    wanted = ["download", f"transformers=={version}", "--no-deps", "--no-binary", ":all:", "-d", str(cached), "-q"]
    done = subprocess.run([sys.executable, "-m", "pip", *wanted], capture_output=True, text=True, timeout=300)
    archive = cached / f"transformers-{version}.tar.gz"
    if done.returncode != 0 or not archive.is_file():
        raise Unavailable(
            f"the source distribution of transformers {version} cannot be downloaded: {done.stderr.strip()[-300:]}"
        )
    with tarfile.open(archive) as files:
        files.extractall(cached, filter="data")
    return folder


@cache
def library_module(name: str) -> types.ModuleType:
    """Import a module of transformers' tests folder, such as `test_modeling_common`. Raises `Unavailable`."""
    if importlib.util.find_spec("parameterized") is None:
        raise Unavailable("transformers' tests need the package parameterized (pip install parameterized)")
    folder = source_folder() / "tests"
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[PACKAGE] = package
        _add_missing_module(
            folder, "generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {})
        )
        _add_missing_module(folder, "exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _add_missing_module(folder, "utils.test_configuration_utils", config_common_kwargs={})
        if not (folder.parent / "utils" / "fetch_hub_objects_for_ci.py").is_file():
            fetch = types.ModuleType("fetch_hub_objects_for_ci")
            fetch.url_to_local_path = lambda url, return_url_if_not_found=True: url
            sys.modules["fetch_hub_objects_for_ci"] = fetch
    return importlib.import_module(f"{PACKAGE}.{name}")


def has_generation_mixin() -> bool:
    return (source_folder() / "tests" / "generation" / "test_utils.py").is_file()


def _add_missing_module(folder: Path, name: str, **content) -> None:
    if (folder / f"{name.replace('.', '/')}.py").is_file():
        return
    parent = f"{PACKAGE}.{name.rpartition('.')[0]}"
    if parent not in sys.modules:
        sys.modules[parent] = types.ModuleType(parent)
        sys.modules[parent].__path__ = []
    module = types.ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(content)
    sys.modules[module.__name__] = module
