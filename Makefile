# make demo: set up and run the main job.   make test: set up and run the tests.
# PYTHON=python3.13 takes another interpreter; remove the environment of the one before first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP = -m pip install --quiet --disable-pip-version-check
INSTALL = $(BIN)/python $(PIP) -c constraints.txt

# The two ends of the declared ranges have environments of their own.
NEWEST := .venv-newest
LOWEST := .venv-lowest
WHEELS := build/wheels
EXTRAS := mri,train,eval,app,dev,docs

# One thread a worker: two workers with two threads each would only get in each other's way. Each has
# half of the files and takes from the other when it has none left, so that few fixtures are made
# twice; files with slow tests are first (tests/conftest.py), and the last tests are short.
PYTEST := -m pytest -n 2 --dist worksteal

# What a new release of a dependency breaks first (`make quick` runs other tests: the fast ones that
# tests/conftest.py names): loading, the cache, packing, Trainer and PEFT, the commands, a
# reconstruction.
SURFACE := tests/test_package.py tests/test_dependencies.py tests/model/test_contract.py \
	tests/model/test_generation.py tests/model/test_invariants.py tests/model/test_training_contract.py \
	tests/model/test_packing.py tests/cli/test_language.py tests/cli/test_mri.py tests/mri/io \
	tests/mri/model/test_codec.py

.PHONY: demo test quick lint types imports docs site links figures dist clean newest lowest test-newest test-newest-quick test-lowest

demo: $(VENV)/.demo
	$(BIN)/nirvana demo --out out/demo

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test
	$(BIN)/python $(PYTEST) --durations=10

# A fast test or two of every room, in less than two minutes.
quick: export OMP_NUM_THREADS = 1
quick: $(VENV)/.test
	$(BIN)/python $(PYTEST) -m quick

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/pyright

imports: $(VENV)/.test
	$(BIN)/lint-imports

docs: $(VENV)/.test
	$(BIN)/python -m pytest -n 0 tests/test_docs.py

# The site in build/site: examples are run for their pictures, warnings are errors. EXAMPLES is a
# regular expression that chooses which of them are run; the others' pages have no pictures.
site: export OMP_NUM_THREADS = 1
site: $(VENV)/.test
	$(BIN)/python -m sphinx -n -q -W --keep-going -c docs -d build/doctrees \
		$(if $(EXAMPLES),-D sphinx_gallery_conf.filename_pattern='$(EXAMPLES)') . build/site

# Addresses outside of the repository; needs a network.
links: $(VENV)/.test
	$(BIN)/python -m sphinx -q -b linkcheck -D sphinx_gallery_conf.plot_gallery=0 -c docs -d build/doctrees . build/links

# Every drawing and picture in docs/images, and the numbers that the tutorials show, anew. The picture
# of a measured scan needs the folder DATA and BART's program, see docs/figures/readme.py, and those of
# the page need a browser.
figures: $(VENV)/.test
	$(BIN)/python docs/figures/concepts.py
	$(BIN)/python docs/figures/readme.py $(DATA)
	$(BIN)/python docs/figures/tutorials.py
	$(BIN)/python docs/figures/app.py

# Source distribution, and the wheel that is built from it, as a release has them.
dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(BIN)/twine check --strict dist/*

# The newest versions that pip finds within the ranges. New ones appear without a change here, so
# the environment is always made anew.
test-newest test-newest-quick: export OMP_NUM_THREADS = 1
test-newest: newest
	$(NEWEST)/bin/python $(PYTEST) --durations=10

test-newest-quick: newest
	$(NEWEST)/bin/python $(PYTEST) $(SURFACE)

# The clean install: the wheel alone first, as a user gets it, then with the extras.
newest: dist
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP) pytest dist/nirvana-*.whl
	$(NEWEST)/bin/python -m pytest tests/install/test_wheel.py tests/install/test_standalone.py
	$(NEWEST)/bin/python $(PIP) --upgrade --upgrade-strategy eager \
		"$$(echo dist/nirvana-*.whl)[$(EXTRAS)]"
	$(NEWEST)/bin/python -m pip check
	$(NEWEST)/bin/python -m pytest tests/install/test_extras.py

test-lowest: export OMP_NUM_THREADS = 1
test-lowest: $(LOWEST)/.test
	$(LOWEST)/bin/python $(PYTEST) --durations=10

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) build dist out docs/gallery docs/api/commands.md

$(VENV)/bin/python $(LOWEST)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.13 is needed: none found on the PATH"; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[mri]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

$(LOWEST)/.test: $(LOWEST)/bin/python pyproject.toml constraints-lowest.txt
	$(LOWEST)/bin/python $(PIP) -c constraints-lowest.txt -e '.[$(EXTRAS)]'
	$(LOWEST)/bin/python -m pip check
	@touch $@
