# `make repro` and `make test` need only Python 3.11 to 3.13 (another name: make repro PYTHON=python3.12) and make.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test real lint

repro: $(VENV)/ready
	dvc repro

# A process a core, each with one thread: two of each hinder one another (9 minutes instead of 4 on two cores).
test: $(VENV)/ready
	OMP_NUM_THREADS=1 pytest --numprocesses auto --dist worksteal

# Trains on all the shared real data sets, where they lie beside the repository, and tells what each reached and took.
real: $(VENV)/ready
	FULL=1 pytest --capture=no tests/test_real_data.py

lint: $(VENV)/ready
	ruff check .
	ruff format --check .
	mypy src stages

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old, expected Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --requirement requirements.txt
	touch $@
