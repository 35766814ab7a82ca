# Everything runs in .venv, which the first command makes; nothing but Python packages is downloaded.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests are small: threads would only wait for each other on a shared machine.
test test-all: export OMP_NUM_THREADS ?= 1

.PHONY: studio test test-all lint bench clean

studio: $(VENV)/.studio
	$(BIN)/textcond studio

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow" -q

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -q

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test
	for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.studio: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -e ".[test]"
	touch $@ $(VENV)/.studio
