"""Runs code in a fresh process that knows nothing of this repository: the way of a user who has only the Hub id."""

import json
import os
import subprocess
import sys
from pathlib import Path

# The editable install hooks itself into every process of this environment, so the import is refused by a finder that
# comes before all others; the assertion proves it before the code runs.
_PREAMBLE = """
import importlib, sys
class _NotInstalled:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "blipren" or name.startswith("blipren."):
            raise ModuleNotFoundError(f"No module named {name!r} (hidden for this test)", name=name)
sys.meta_path.insert(0, _NotInstalled)
try:
    importlib.import_module("blipren")
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("blipren is importable, so this would prove nothing")
"""


def run_fresh(
    code: str, cwd: str | Path, environment: dict[str, str] | None = None, installed: bool = False, timeout: int = 300
) -> subprocess.CompletedProcess:
    """Runs `code` in a new Python process in `cwd`; without our package unless `installed`. Returns the process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "PYTEST_", "PYTHON"))}
    kept |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    script = code if installed else _PREAMBLE + code
    return subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=cwd,
        env=kept | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def fresh_result(code: str, cwd: str | Path, environment: dict[str, str] | None = None, **options) -> object:
    """Like `run_fresh`, for code that ends with `result = ...`: returns it (through JSON), raises if the code failed."""
    marker = "\x1eresult "
    process = run_fresh(f"{code}\nimport json\nprint({marker!r} + json.dumps(result))", cwd, environment, **options)
    if process.returncode != 0:
        raise AssertionError(f"the fresh process failed:\n{process.stdout}\n{process.stderr}")
    return json.loads(process.stdout.rsplit(marker, 1)[1])
