# Every target but `lock` installs first; that is instant when nothing has
# changed.
PY := .venv/bin/python
# Options for pytest: make test ARGS='tests/methods -k tat'
# and for the lock: make lock ARGS=--upgrade
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install lock demo test package docs lint format clean

help: ## Show the targets.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

install: ## Make .venv and install mmkd and all it needs into it.
	@bash tools/install.sh

lock: ## Lock all packages anew (ARGS=--upgrade: their newest versions).
	@bash tools/lock.sh $(ARGS)

demo: install ## Distil a small detector on real photos.
	@$(PY) tools/demo.py

# One OpenMP thread: with a second busy process on a small machine, more
# threads wait for each other and are far slower.
test: install ## Run the tests (ARGS='…' goes to pytest).
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 \
		--dist loadfile $(ARGS)

package: install ## Build sdist and wheel into dist/, check and try them.
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) \
		$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m '' tests/test_packaging.py

# The notebook trains three networks, once; what has not changed is kept.
docs: install ## Build the documentation into docs/_build/html.
	@OMP_NUM_THREADS=1 $(PY) -m sphinx -W --keep-going docs docs/_build/html

lint: install ## Check style, types and spelling.
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m codespell_lib
	.venv/bin/lint-imports

format: install ## Mend what ruff can mend.
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## Remove .venv, build outputs and caches (data and runs stay).
	rm -rf .venv build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find mmkd tests tools -name __pycache__ -prune -exec rm -rf {} +
