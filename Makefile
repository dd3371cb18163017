# Everything runs in a virtual environment that is made here when there is none: `make test` in a fresh clone just works.
#   make test PYTHON=python3.12      another interpreter for the environment
#   make test PYTEST_ARGS="-k hub"   more arguments for pytest
#   make test EXTRAS=dev,deepspeed   more of the optional dependencies; with this one the tests of ZeRO-2 and ZeRO-3 run

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
PYTEST_ARGS ?=

PY = $(VENV)/bin/python
comma = ,
INSTALLED = $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
# Programs that a package brings are found by the processes that a test starts (ninja, accelerate).
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: quickstart test test-slow check format benchmark clean
.DEFAULT_GOAL := test

# The stamp is older than pyproject.toml or constraints.txt after an edit: then pip runs again.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

quickstart: $(INSTALLED)
	$(PY) examples/quickstart.py

test: $(INSTALLED)
	$(PY) -m pytest -ra -m "not slow and not gpu" $(PYTEST_ARGS)

# pytest exits with 5 when no test is marked slow: that is no failure.
test-slow: $(INSTALLED)
	$(PY) -m pytest -ra -m "slow and not gpu" $(PYTEST_ARGS) || test $$? -eq 5

check: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

benchmark: $(INSTALLED)
	$(PY) examples/benchmark.py laser

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +
