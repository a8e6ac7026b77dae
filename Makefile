# One virtual environment for everything; `make test VENV=path` uses another one that is there already.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow soak lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Again whenever the requirements change; pip asks no index for what is installed in the right version.
$(INSTALLED): requirements.txt requirements-dev.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(INSTALLED) ## Train, prune, quantize and report on rendered photos (minutes; nothing to download)
	$(PYTHON) compress.py configs/recipes/quickstart.yaml --out runs/quickstart

test: $(INSTALLED) ## Run the tests but the slow ones
	$(PYTHON) -m pytest -m "not slow" -n 2 --dist worksteal --timeout 300

test-slow: $(INSTALLED) ## Run the slow tests
	$(PYTHON) -m pytest -m slow

soak: $(INSTALLED) ## Kill a small recipe over 30 times, and compare its end with an undisturbed one (a quarter of an hour)
	$(PYTHON) tests/soak.py

lint: $(INSTALLED) ## Check style, format and types
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

clean: ## Remove caches, but neither the environment nor results
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
