PYTHON ?= python3
SHELLS := .ci/run $(wildcard launch/slurm/*.sbatch)

export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help .venv demo test fuzz lint clean

help:
	@echo "make demo | test | fuzz | lint | .venv | clean"

.venv: .venv/installed

# The stamp is written last, so an install that was cut short is never taken for a whole one.
.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1 | tail -n 1), but Python 3.12 is needed:" \
	    "install it (pyenv install 3.12) or name it (make PYTHON=/path/to/python3.12)." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/installed
	.venv/bin/python launch/demo.py

# The tests' own processes share the cores, so each takes one thread.
test: export OMP_NUM_THREADS ?= 1
test: .venv/installed
	.venv/bin/python -m pytest -q -n 2 --dist loadgroup tests

# Damaged files of every kind that is read: exceptions other than UserError, hangs and memory are printed, and end it with status 1.
fuzz: export OMP_NUM_THREADS ?= 1
fuzz: .venv/installed
	.venv/bin/python -m tests.fuzz --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	for script in $(SHELLS); do bash -n $$script || exit 1; done
	.venv/bin/shellcheck $(SHELLS)
	.venv/bin/hadolint Dockerfile

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
