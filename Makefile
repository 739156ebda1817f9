# Two commands matter: `make reproduce` and `make test`. Both set up their own environment in .venv first.
PYTHON ?= python3
PROFILE ?= cpu
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: help setup reproduce test validate lint format doctor clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1~\2/p' Makefile | column -t -s '~' 2>/dev/null || sed -n 's/^\([a-z]*\):.*## /  make \1: /p' Makefile

# The environment is whole only if $(READY) holds the fingerprint of what it was made from; an interrupted set-up never
# writes it, and is made anew (pip takes what it had already downloaded from its cache).
setup:  ## the environment, made anew only if pyproject.toml, constraints.txt, Python or the folder changed
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true); name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@want=$$($(PYTHON) -c 'import hashlib, os, sys; h = hashlib.sha256(f"{sys.version} {os.getcwd()}".encode()); [h.update(open(f, "rb").read()) for f in ("pyproject.toml", "constraints.txt")]; print(h.hexdigest())'); \
	if [ "$$(cat $(READY) 2>/dev/null)" != "$$want" ]; then \
	  echo "setting up $(VENV) (a few minutes, once)"; \
	  $(PYTHON) -m venv --clear $(VENV) && \
	  $(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e . && \
	  echo "$$want" > $(READY); \
	fi

reproduce: setup  ## the whole chain of PROFILE (cpu), then verdicts, comparison and where to look
	@$(RUN) -m sae_research reproduce --profile $(PROFILE)

test: setup  ## all tests: unit, notebooks, the smoke chain through DVC, nbval on its notebooks
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

validate: setup  ## nbval: run the committed notebooks of PROFILE (cpu) again and compare every output
	@$(RUN) -m sae_research validate --profile $(PROFILE)

doctor: setup  ## what this machine can run, and what is missing
	@$(RUN) -m sae_research doctor

lint: setup  ## ruff, without changing anything
	@$(RUN) -m ruff check && $(RUN) -m ruff format --check

format: setup  ## ruff, and clear the notebook sources
	@$(RUN) -m ruff check --fix && $(RUN) -m ruff format && $(RUN) -m sae_research clear

clean:  ## remove the environment, caches and intermediate files; results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .dvc/cache .dvc/tmp .reproduce data/scratch
	rm -rf data/*/runs data/*/*/artefacts data/smoke figures/smoke notebooks/executed/smoke
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
