# `make compare` and `make test` do all the set-up: a virtual environment of their own, then the install.
PYTHON ?= python3
VENV   ?= .venv-$(notdir $(PYTHON))
BIN     = $(VENV)/bin
READY   = $(VENV)/.installed

.PHONY: compare compare-hour test bench clean

compare: $(READY)
	$(BIN)/python -m experiments.compare --preset=quick --out=runs/compare

compare-hour: $(READY)
	$(BIN)/python -m experiments.compare --preset=hour --out=runs/compare-hour

test: $(READY)
	$(BIN)/python -m pytest tests

bench: $(READY)
	$(BIN)/python -m experiments.bench

$(READY): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "archlab needs Python >= 3.11; try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf .venv-* build *.egg-info .pytest_cache
