# Two commands: `make quickstart` and `make test`. Both build .venv when it is not there; nothing else is needed but
# Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OUT ?= quickstart-out

.PHONY: quickstart test lint format

quickstart: .venv/ready
	.venv/bin/blipren quickstart --out $(OUT)

# one process a core, one thread a process: two test processes with two threads each stand in each other's way
test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready
