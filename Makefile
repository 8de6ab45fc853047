# make demo: raw text to a trained, evaluated, sampled model, in minutes on a laptop.   make test: the tests.
# make test-all: those that take longer, after make test.   make test-gpu: those of the kernels, compiled for the GPU at hand.
# All need only Python 3.11 or newer and make; everything is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
PROCESSES ?= 8

.PHONY: demo test test-all test-gpu lint bench clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-gpu: .venv/installed
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('test-gpu: this machine shows no GPU')"
	$(BIN)/python -m pytest -m "gpu or not slow" -n $(PROCESSES) --dist worksteal tests/ops tests/mixers

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/gdn2_cpu.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
