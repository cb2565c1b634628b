# make demo    pre-train on images, transfer to volumes, against scratch: a table and pictures in demo/
#              IMAGES=<class folders>, VOLUMES=<folder of NIfTI pairs> and OUT=<folder> take your own data elsewhere
# make test    style, types and the whole test suite, with the coverage by the fast tests
# make quick   the fast tests alone
# make budget  lines of each room against its budget
# make versions  the fast tests with the lowest versions, and with Python 3.10 and 3.13 (uv; several GB a Python)

PYTHON ?= python3
VENV ?= .venv
IMAGES ?=
VOLUMES ?=
OUT ?= demo
BIN = $(VENV)/bin
PACKAGES = networks vdt_transforms vdt_workflows
# Waiting threads that spin for ever make data loading and training fight for a CPU's cores; ones that sleep at once are
# slow with small networks. This many turns is a fraction of a millisecond.
export GOMP_SPINCOUNT = 100000

.PHONY: demo test quick budget versions clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py --output_dir "$(OUT)" --images "$(IMAGES)" --volumes "$(VOLUMES)"

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow" $(PACKAGES:%=--cov=%) --cov-report=
	@echo "coverage of the fast tests: $$($(BIN)/coverage report --format=total) %"
	$(BIN)/pytest -q -n 2 --dist loadfile -m slow --durations=20

quick: $(VENV)/.installed-dev
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

budget:
	$(PYTHON) scripts/count.py

versions: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python scripts/versions.py --uv $(BIN)/uv

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache
