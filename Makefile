# Needs GNU make, a shell and a Python >= 3.12; everything else goes into .venv.
#   make PYTHON=/path/to/python     takes that interpreter
#   make demo ARGS=--config.scale=smoke
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := lm experiments launch notebooks tests
PYTHON :=
ARGS :=

.PHONY: help venv demo test test-slow soak lint clean

help:
	@echo "make demo       runs the desk study into runs/desk and ends with its verdicts and the page"
	@echo "make test       lint and every quick test"
	@echo "make test-slow  the tests marked slow"
	@echo "make soak       a sweep under kills, stops, damage and full disks, here and on Slurm (root)"
	@echo "make lint       ruff and mypy"
	@echo "make venv       only installs, into $(VENV)"
	@echo "make clean      removes $(VENV) and the caches; leaves runs/ alone"

venv: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/lm run experiments/desk.py --workdir=runs/desk $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

soak: $(INSTALLED)
	$(BIN)/python tests/faults/soak.py --workdir=runs/soak $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate counts only if running it says so: pyenv's shims are on the PATH and fail when run,
# and some distributions ship a python3 without ensurepip.
$(INSTALLED): setup.cfg pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; \
	  for python in $(or $(PYTHON),python3.13 python3.12 python3 \
	      $$(ls -d $$HOME/.pyenv/versions/*/bin/python3 2>/dev/null | sort -rV)); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' \
	        >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: error: no Python >= 3.12 with venv was found$(if $(PYTHON), at $(PYTHON));" \
	      "install one, or name it with 'make PYTHON=/path/to/python3.13'" >&2; \
	    exit 2; \
	  fi; \
	  echo "making $(VENV) with $$("$$found" --version), $$(command -v "$$found")"; \
	  "$$found" -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "installing into $(VENV); the first time takes a few minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
