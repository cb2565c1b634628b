# make demo    pre-train on images, fine-tune on volumes beside scratch, segment: what came out is in demo/index.html
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
SHELL = bash
BIN = $(VENV)/bin
# name:python:which versions uv takes. Interpreters that uv does not find it downloads, unless UV_PYTHON_DOWNLOADS=never.
VERSIONS ?= lowest:3.10:lowest-direct python3.10:3.10:highest python3.13:3.13:highest
OUTSIDE ?= .versions
TESTS ?= tests
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
	@failed=; for row in $(VERSIONS); do IFS=: read -r name python resolution <<< "$$row"; place=$(OUTSIDE)/$$name; \
	echo "== $$name: Python $$python, $$resolution versions"; \
	$(BIN)/uv venv --quiet --allow-existing --python $$python $$place \
	&& $(BIN)/uv pip install --quiet --python $$place/bin/python --resolution $$resolution --editable ".[dev]" \
	&& $(BIN)/uv pip list --quiet --python $$place/bin/python 2>/dev/null | grep -E "^(torch|monai|numpy) " \
	&& $$place/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu" $(TESTS) \
	|| failed="$$failed $$name"; done; test -z "$$failed" || { echo "not passed:$$failed"; exit 1; }

$(VENV)/.installed: pyproject.toml
	@echo "installing into $(VENV): some 6 GB, most of it PyTorch for CUDA; minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[report]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache
