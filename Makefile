# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv by itself.

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3.11)
BIN := .venv/bin

.PHONY: help setup demo test lint lock clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

# The stamp holds the lock it was made from: a changed lock or pyproject sets up again.
.venv/.done: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch .venv/.done

setup: .venv/.done  ## create .venv with the pinned versions

demo: setup  ## real footage to shards, a report and a few training steps, in minutes
	$(BIN)/clipmill demo

test: setup  ## every test, on up to four cores
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: setup  ## resolve the newest versions into requirements.lock
	$(BIN)/python bench/lock.py

clean:  ## remove .venv and what the demo wrote
	rm -rf .venv demo
