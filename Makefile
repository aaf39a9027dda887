# make demo: from real images to a one-step sampler.  make lint, make test, make test-slow: what CI runs.

PYTHON ?= python3
WORKDIR ?= runs/digits
BIN := .venv/bin
# The exact versions, for what is installed and for what it is built with.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: demo install test test-slow lint clean

demo: .venv/demo
	$(BIN)/python main.py --config=configs/digits.py --workdir=$(WORKDIR)
	@echo "The report: $(WORKDIR)/report/index.html"

install: .venv/dev

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo: setup.py constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/dev: setup.py constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@ .venv/demo

# Every module, in minutes.
test: .venv/dev
	$(BIN)/python -m pytest -m 'not slow'

# Processes that are killed and stopped, several processes, full disks, whole runs.
test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy diffusion_distillation configs main.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
