# A fresh clone needs make and Python 3.11 or newer; everything else is installed into .venv.
# `make PYTHON=python3.12 test` names the interpreter; otherwise the first one that is new enough is taken.

NEW_ENOUGH := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done),python3)
RUN := .venv/bin/python
WORKDIR ?= runs/demo

.PHONY: .venv arc test lint bench

.venv: .venv/.stamp

.venv/.stamp: pyproject.toml
	@$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { echo "tinyonn_jax needs Python 3.11 or newer with the venv module, and" \
		"$(PYTHON) is $$($(PYTHON) --version 2>&1). Install one and name it: make PYTHON=python3.12 .venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -e '.[dev]'
	@touch $@

arc: .venv
	$(RUN) experiments/arc.py train --preset demo --workdir $(WORKDIR)
	$(RUN) experiments/arc.py evaluate --workdir $(WORKDIR)
	$(RUN) experiments/arc.py report --workdir $(WORKDIR)

test: .venv
	$(RUN) -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: .venv
	$(RUN) -m ruff check .
	$(RUN) -m pyright

bench: .venv
	$(RUN) experiments/benchmark.py
