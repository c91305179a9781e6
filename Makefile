# make demo   sets up a virtual environment and runs the demonstration, which ends on a page
# make test   sets up a virtual environment and passes the tests
# make check  the same with linter and type checker, as CI runs them
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
# Python compiles what is imported; pip would compile all, which takes as long as the rest. Where
# Python may not keep what it compiles, every process that imports torch compiles it again: 8 s.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS)
READY = $(VENV)/ready-$(notdir $(CONSTRAINTS))
PYTEST_FLAGS ?= -n auto --dist worksteal

.PHONY: setup demo test check lint clean

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) src/glmtune/doctor/checkout.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/glmtune demo $(DEMO_FLAGS)

# One thread a worker: the tests' tensors are tiny, and threads that wait for each other cost more
# than they give.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf $(VENV) build dist src/*.egg-info
