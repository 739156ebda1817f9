# Two commands matter: `make reproduce` and `make test`. Both set up their own environment in .venv first.
PYTHON ?= python3
PROFILE ?= cpu
# auto: uv, and pip if uv fails. Or name one: make setup INSTALLER=pip
INSTALLER ?= auto
UV_VERSION := 0.13.9
VENV := .venv
RUN := $(VENV)/bin/python
UV := $(VENV)/bin/uv
READY := $(VENV)/ready

# Python keeps what it compiled: where it may not, every kernel compiles torch and transformer-lens anew (10 s).
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup lock reproduce test test-faults validate lint typecheck format doctor clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1~\2/p' Makefile | column -t -s '~' 2>/dev/null || sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

# Both ways install the same versions: uv.lock for uv, and constraints.txt (made from uv.lock) for pip.
# The environment uses $(PYTHON), never a Python that uv would download.
PIP_INSTALL = $(RUN) -m pip install $$quiet --disable-pip-version-check
GET_UV = $(PIP_INSTALL) uv==$(UV_VERSION)
WITH_UV = $(PYTHON) -m venv --clear $(VENV) && $(GET_UV) && env -u VIRTUAL_ENV UV_PROJECT_ENVIRONMENT=$(VENV) \
  UV_PYTHON_DOWNLOADS=never $(UV) sync $$quiet --frozen --inexact --python $(RUN)
WITH_PIP = $(PYTHON) -m venv --clear $(VENV) && $(PIP_INSTALL) -c constraints.txt -e .

# $(READY) holds a fingerprint of what the environment was made from. It is written last, so an interrupted set-up is
# made anew; what was already downloaded comes from the cache.
setup:  ## the environment, made anew only if its sources, Python or the folder changed
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true); name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@want=$$($(PYTHON) -c 'import hashlib, os, sys; h = hashlib.sha256(f"{sys.version} {os.getcwd()}".encode()); [h.update(open(f, "rb").read()) for f in ("pyproject.toml", "uv.lock", "constraints.txt")]; print(h.hexdigest())') || exit 1; \
	if [ "$$(cat $(READY) 2>/dev/null)" = "$$want" ]; then exit 0; fi; \
	start=$$(date +%s); \
	if [ -t 2 ]; then quiet=; else quiet=-q; fi; \
	echo "Setting up $(VENV). The first time downloads PyTorch (about 3 GB on Linux)."; \
	case "$(INSTALLER)" in \
	  auto) with=uv; { $(WITH_UV); } || { \
	    echo "uv could not set up the environment; trying pip." >&2; with=pip; $(WITH_PIP); } ;; \
	  uv) with=uv; $(WITH_UV) ;; \
	  pip) with=pip; $(WITH_PIP) ;; \
	  *) echo "INSTALLER is auto, uv or pip, not '$(INSTALLER)'" >&2; false ;; \
	esac && \
	echo "$$want" > $(READY) && \
	echo "$(VENV) is ready: installed with $$with in $$(( $$(date +%s) - start )) s."

lock:  ## after a change of dependencies: uv.lock anew, and constraints.txt from it
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(GET_UV) && $(UV) lock --python $(RUN) && \
	$(UV) export -q --frozen --all-extras --no-hashes --no-annotate --no-header --no-emit-project -o $(VENV)/pins.txt && \
	sed 's/ *;.*//' $(VENV)/pins.txt > constraints.txt

reproduce: setup  ## the whole chain of PROFILE (cpu), then verdicts, comparison and where to look
	@$(RUN) -m sae_research reproduce --profile $(PROFILE)

test: setup  ## all tests: unit, notebooks, the smoke chain through DVC, nbval on its notebooks
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-faults: setup  ## what is damaged, killed or cut off is refused in a sentence and loses nothing
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m faults tests/faults

validate: setup  ## nbval: run the committed notebooks of PROFILE (cpu) again and compare every output
	@$(RUN) -m sae_research validate --profile $(PROFILE)

doctor: setup  ## what this machine can run, and what is missing
	@$(RUN) -m sae_research doctor

lint: setup  ## ruff and mypy, without changing anything
	@$(RUN) -m ruff check && $(RUN) -m ruff format --check && $(RUN) -m mypy

typecheck: setup  ## mypy on the public API
	@$(RUN) -m mypy

format: setup  ## ruff, and clear the notebook sources
	@$(RUN) -m ruff check --fix && $(RUN) -m ruff format && $(RUN) -m sae_research clear

clean:  ## remove the environment, caches and intermediate files; results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .dvc/cache .dvc/tmp data/scratch data/cache
	rm -rf data/*/runs data/*/*/artefacts data/smoke figures/smoke notebooks/executed/smoke
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
