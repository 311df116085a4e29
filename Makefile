# `make repro` and `make test` need only Python 3.11 to 3.13 (another name: make repro PYTHON=python3.12) and make.
PYTHON ?= python3
VENV := .venv
MODULES := app/node_modules/.package-lock.json
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro serve verify test torture portable real bench parity load lint

repro: $(VENV)/ready
	dvc repro

# The model as a web service, with its page, at http://127.0.0.1:8000; npm, where it is there, adds the phone app.
serve: $(VENV)/ready $(MODULES)
	dvc repro export
	python -m app.service

# Makes the working tree's results again in a temporary clone and compares them; another revision: make verify REV=v1.
verify: $(VENV)/ready
	python -m tools.verify $(REV)

# A process a core, each with one thread: two threads each would hinder one another.
test: $(VENV)/ready $(MODULES)
	OMP_NUM_THREADS=1 pytest --numprocesses auto --dist worksteal

# Kills training at 25 random moments, in the workspace, --temp and the queue: does it end in the same bytes?
torture: $(VENV)/ready
	OMP_NUM_THREADS=1 python -m tests.torture

# Runs every stage on emulated CPUs of Intel and AMD: are the bytes the same? Needs qemu-user 10 (docs/exact.md).
portable: $(VENV)/ready
	FULL=1 pytest --capture=no tests/test_portable.py

# Trains on all the shared real data sets, where they lie beside the repository, and tells what each reached and took.
real: $(VENV)/ready
	FULL=1 pytest --capture=no tests/test_real_data.py tests/test_backbones.py::test_real_weights_tell_cats_from_dogs

# Measures everything beside the tutorial's loop and the machine's limits: benchmarks/results.json, docs/performance.md.
bench: $(VENV)/ready
	python -m benchmarks.bench

# Does each way of deployment answer as the evaluated model? Trains two models on the shared data the first time.
parity: $(VENV)/ready $(MODULES)
	python -m tests.parity

# Loads, attacks, kills and replaces a running service on the loopback; takes 20 minutes of a quiet machine.
load: $(VENV)/ready
	python -m tests.load

lint: $(VENV)/ready
	ruff check .
	ruff format --check .
	mypy src stages tools benchmarks app

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old, expected Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --requirement requirements.txt
	touch $@

# What the phone app runs, and what checks the page; without npm there is no phone app, and its tests are skipped.
$(MODULES): app/package-lock.json
	@! command -v npm > /dev/null || npm ci --prefix app --ignore-scripts --no-audit --no-fund
