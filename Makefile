# Each target makes the environment it needs. A torch that $(PYTHON) already has (a CUDA build, say) is used as it
# is; else constraints.txt pins the one we test with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HAS_TORCH := $(shell $(PYTHON) -c "import torch; print('yes')" 2>/dev/null)

.PHONY: test mutants demo benchmarks lint types build clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) $(VENV)
	$(if $(HAS_TORCH),grep -v "^torch==",cat) constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt torch
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt -e ".[dev]"
	touch $@

test: $(VENV)/.installed  ## run all tests and doctests, with branch coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-fail-under=95

mutants: $(VENV)/.installed  ## make small faults in the package, one at a time, and list those that no test notices (slow)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

demo: $(VENV)/.installed  ## train a UNet and a KAF-UNet on synthetic volumes, compare them, draw outputs/demo.png
	$(BIN)/python examples/demo.py

benchmarks: export RESULTS := outputs/benchmarks
benchmarks: $(VENV)/.installed  ## every benchmark at a small size, into outputs/benchmarks
	$(BIN)/python benchmarks/flops.py --edges 128 256 --attentions 20
	$(BIN)/python benchmarks/memory.py --edges 128 256 --attentions 20
	$(BIN)/python benchmarks/speed.py --parts diffusion --edges 64 --repeats 3
	$(BIN)/python benchmarks/context.py synthetic --steps 20 --images 100 --output outputs/benchmarks/context
	$(BIN)/python benchmarks/addition.py --steps 5 --images 20
	$(BIN)/python benchmarks/detection.py --only agreement
	$(BIN)/python benchmarks/matching.py --only sinkhorn --points 128 --repeats 3

lint: $(VENV)/.installed  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed  ## mypy --strict on the package
	$(BIN)/mypy

build: $(VENV)/.installed  ## sdist and wheel, the wheel imported in an empty environment
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv --clear dist/venv
	dist/venv/bin/pip install --quiet -c constraints.txt torch
	dist/venv/bin/pip install --quiet -c constraints.txt dist/*.whl
	cd dist && venv/bin/python -W error -c "import kaf_layer; print('kaf_layer', kaf_layer.__version__)"

clean:  ## remove the environment and everything built
	rm -rf $(VENV) dist outputs .coverage .pytest_cache .mypy_cache .ruff_cache
