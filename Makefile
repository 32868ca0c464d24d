# `make demo` and `make test` need python3 (3.11 or newer) with venv, and nothing else: each makes its
# own virtual environment first. pip's own settings (index, cache, certificates) are honoured.

PYTHON ?= python3
# One worker a core; `make test PYTEST_ARGS="-n 2 -k verify"` for less.
PYTEST_ARGS ?= -n auto
BIN := .venv/bin
STAMP := .venv/installed
INPUTS := pyproject.toml constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

.DEFAULT_GOAL := help
.ONESHELL:
SHELL := /bin/sh
.SHELLFLAGS := -euc
.PHONY: help demo test lint format fixtures bench clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' Makefile | while IFS='|' read -r name what; do
		printf '%-16s%s\n' "$$name" "$$what"
	done

demo: $(STAMP) ## convert, verify and compare a small training checkpoint, step by step
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh fixtures/demo.sh

test: lint ## linters, types, and every test
	$(BIN)/python tests/fetch_corpus.py
	$(BIN)/python tests/fetch_mirror.py
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the code in the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fixtures: $(STAMP) ## make the files in fixtures/ again
	$(BIN)/python fixtures/make_fixtures.py
	$(BIN)/python fixtures/make_broken.py

bench: $(STAMP) ## measure speed and memory (makes a 4 GiB file, takes minutes)
	$(BIN)/python benchmarks/run.py --workdir .cache/benchmark $(BENCH_ARGS)

clean: ## remove everything that the other targets made
	rm -rf .venv .demo .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamp holds the digest of what was installed from: a checkout that only touches the files does
# not cost a new environment, a changed one is made anew so that nothing of the old one stays.
$(STAMP): $(INPUTS)
	@digest=$$(cat $(INPUTS) | sha256sum)
	if [ -f $@ ] && [ "$$(cat $@)" = "$$digest" ]; then touch $@; exit 0; fi
	if ! command -v $(PYTHON) >/dev/null; then
		echo 'error: there is no `$(PYTHON)` on this machine' >&2
		echo 'hint: apt-get install python3 python3-venv, or name one: make PYTHON=/path/to/python3.11' >&2
		exit 1
	fi
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
		echo "error: \`$(PYTHON)\` is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed" >&2
		echo 'hint: install a newer one beside it and name it: make PYTHON=python3.11' >&2
		exit 1
	fi
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
		echo 'error: `$(PYTHON)` cannot make virtual environments' >&2
		echo 'hint: apt-get install python3-venv' >&2
		exit 1
	fi
	echo 'Setting up .venv, once. Most of the time goes into downloading torch.'
	$(PYTHON) -m venv --clear .venv
	# One call that names torch: installed later, something else would pull in another build of it.
	$(PIP) torch==2.13.0 torchvision==0.28.0 --editable '.[dev]'
	# The upstream package asks for versions that are years old, and works without them.
	$(PIP) --no-deps open-flamingo==2.0.1 einops-exts
	echo "$$digest" > $@
	echo 'Set up.'
