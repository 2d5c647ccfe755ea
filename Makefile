# Two commands: `make quickstart` and `make test`. Each installs into .venv what it needs, and needs nothing but
# Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OUT ?= quickstart-out
INSTALL = .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: quickstart test lint format docs

quickstart: .venv/ready
	.venv/bin/blipren quickstart --out $(OUT)

# one process a core, one thread a process: two test processes with two threads each stand in each other's way
test: .venv/dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# the site, in site/: open site/index.html, or run .venv/bin/mkdocs serve, where the search works too
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) .
	touch $@

.venv/dev: .venv/ready
	$(INSTALL) ".[dev]"
	touch $@

.venv/docs: .venv/ready
	$(INSTALL) ".[docs]"
	touch $@
