"""Check, on request, that our checkpoints work on every version of transformers from 5.17 to the newest.

    python tests/compatibility/prove.py [VERSION ...] [--environments DIR]

Each version gets its own environment, which uses torch and the other packages of this one. There, without our package,
a checkpoint is loaded by every auto class, generates, captions through both pipelines, trains one step, is saved and is
loaded again. Exit status 0 only if tokens and logits equal those of the version installed here.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLDEST = (5, 17)


def known_versions() -> list[str]:
    """Return the newest release of each supported minor version on the package index."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "transformers"], capture_output=True, text=True, check=True
    )
    listed = re.search(r"Available versions: (.*)", done.stdout).group(1).split(", ")
    newest: dict[tuple[int, int], str] = {}
    for version in listed:  # newest first
        numbers = version.split(".")
        if len(numbers) == 3 and all(n.isdigit() for n in numbers):
            newest.setdefault((int(numbers[0]), int(numbers[1])), version)
    return [version for minor, version in sorted(newest.items()) if minor >= OLDEST]


def make_environment(folder: Path, version: str) -> Path:
    """Return the Python of an environment with this transformers and the packages that are installed here."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False)
        packages = next(folder.glob("lib/python*/site-packages"))
        # a path in a .pth file adds the packages, but not the hooks of editable installs, such as ours
        (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    probe = "import transformers; print(transformers.__version__)"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True).stdout.strip()
    if found != version:
        subprocess.run([python, "-m", "pip", "install", "-q", f"transformers=={version}"], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="by default the last release of every minor version since 5.17")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "blipren" / "compatibility")
    arguments = parser.parse_args()
    versions = arguments.versions or known_versions()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sys.path.insert(0, str(HERE.parent / "hub"))
        from tiny import picture, write_llm, write_model, write_vision

        picture(3, (64, 48)).save(folder / "photo.png")
        write_model(folder / "checkpoint", write_vision(folder / "vision"), write_llm(folder / "llm", chat=True))
        results, wrong = {}, 0  # the first is the version installed here, with which the others are compared
        for version in dict.fromkeys([importlib.metadata.version("transformers"), *versions]):
            python = make_environment(arguments.environments / version, version)
            environment["HF_HOME"] = str(folder / f"home-{version}")
            done = subprocess.run(
                [python, "-P", str(HERE / "check.py"), str(folder)], env=environment, capture_output=True, text=True
            )
            if done.returncode != 0:
                print(f"{version}: failed\n{done.stderr[-3000:]}", flush=True)
                wrong += 1
                continue
            results[version] = json.loads(done.stdout.splitlines()[-1])
            hub = results[version].pop("huggingface_hub")
            difference = compare(results[version], next(iter(results.values())))
            wrong += difference is not None
            print(f"{version} with huggingface_hub {hub}: {'equal' if difference is None else difference}", flush=True)
    return 1 if wrong else 0


def compare(found: dict, reference: dict) -> str | None:
    """Return the first difference, or None: logits and losses may differ by 1e-4, everything else must be equal."""
    for key, expected in reference.items():
        value = found[key]
        if key in ("logits", "loss"):
            values, wanted = (value, expected) if isinstance(value, list) else ([value], [expected])
            if max(abs(a - b) for a, b in zip(values, wanted, strict=True)) > 1e-4:
                return f"{key} differs"
        elif value != expected:
            return f"{key} is {value!r}, not {expected!r}"
    return None


if __name__ == "__main__":
    sys.exit(main())
