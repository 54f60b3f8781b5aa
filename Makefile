PYTHON ?= python3
PYTEST = .venv/bin/python -m pytest
TESTS = $(PYTEST) -q -n $(or $(WORKERS),2) --dist loadgroup
SHELLS := .ci/run $(wildcard launch/slurm/*.sbatch)

export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help .venv docs demo test test-slow test-all fuzz coverage lint clean

help:
	@echo "make demo | test | test-slow | test-all | fuzz | coverage | lint | docs | .venv | clean"

.venv: .venv/dev

# What the package runs on. The stamp is written last, so that an interrupted install is repeated.
.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1 | tail -n 1), but Python 3.12 is needed:" \
	    "install it (pyenv install 3.12) or name it (make PYTHON=/path/to/python3.12)." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e .
	@touch $@

# The tools of development on top.
.venv/dev: .venv/installed
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

demo: .venv/installed
	.venv/bin/python launch/demo.py

# WORKERS=2 run tests at a time. Their own processes share the cores, so each takes one thread.
test test-slow test-all: export OMP_NUM_THREADS ?= 1
test: .venv/dev
	$(TESTS) -m "not slow and not gpu and not multigpu" tests

# What repeats the former: more seeds, layouts, families and launches.
test-slow: .venv/dev
	$(TESTS) -m slow tests

# Both in one run, which makes the models that they share once.
test-all: .venv/dev
	$(TESTS) -m "(slow or not slow) and not gpu and not multigpu" tests

# Reads damaged files of every kind for MINUTES. Prints exceptions other than UserError, hangs and excess memory; any of them exits with status 1.
fuzz: export OMP_NUM_THREADS ?= 1
fuzz: .venv/dev
	.venv/bin/python -m tests.fuzz --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0)

# `make test`, and the share of each file's lines that it runs.
coverage: export COVERAGE_CORE = sysmon
coverage: .venv/dev
	.venv/bin/coverage erase
	$(MAKE) test PYTEST=".venv/bin/coverage run -m pytest"
	.venv/bin/coverage combine -q
	.venv/bin/coverage report --skip-covered

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache --no-logo
	.venv/bin/mypy
	.venv/bin/python docs/write_configuration.py --check
	.venv/bin/python docs/draw_architecture.py --check
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict
	for script in $(SHELLS); do bash -n $$script || exit 1; done
	.venv/bin/shellcheck $(SHELLS)
	.venv/bin/hadolint Dockerfile

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
