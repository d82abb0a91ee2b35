# make demo: set up and run the main job.   make test: set up and run the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test quick lint types imports docs clean

demo: $(VENV)/.demo
	$(BIN)/nirvana demo --out out/demo

# One thread a worker: two workers with two threads each would only get in each other's way.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=10

# A fast test or two of every room, in less than two minutes.
quick: export OMP_NUM_THREADS = 1
quick: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m quick

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/pyright

imports: $(VENV)/.test
	$(BIN)/lint-imports

docs: $(VENV)/.test
	$(BIN)/python -m pytest -n 0 tests/test_docs.py

clean:
	rm -rf $(VENV) out

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: none found on the PATH"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[mri]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[mri,train,eval,dev]'
	@touch $@
