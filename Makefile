# Each target makes the environment it needs. A torch that $(PYTHON) already has (a CUDA build, say) is used as it
# is, and so is its torchvision; else constraints.txt pins those we test with. A virtual environment's are not seen.
# CONSTRAINTS=/dev/null takes the newest versions of everything, for a Python that the pinned ones do not support.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
has = $(shell $(PYTHON) -c "import sys, $(1); sys.prefix == sys.base_prefix and print('yes')" 2>/dev/null)
HAS_TORCH := $(call has,torch)
# What they need is in the extra dev, except for torchvision, which must not bring a torch of its own.
BACKBONES = dynamic-network-architectures segmentation-models-pytorch timm $(if $(call has,torchvision),,torchvision)

.PHONY: test frameworks mutants demo docs benchmarks gpu lint types build clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) $(VENV)
	$(if $(HAS_TORCH),sed "/^torch==/d",cat) $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt torch
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt -e ".[dev,docs]"
	$(BIN)/pip install --quiet --no-deps -c $(VENV)/constraints.txt $(BACKBONES)
	touch $@

test: $(VENV)/.installed  ## run all tests and doctests, with branch coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=95

# The frameworks need other versions of a few packages than the tests do, and share the rest.
$(VENV)-frameworks/.installed: $(VENV)/.installed constraints-frameworks.txt
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) $(VENV)-frameworks
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> $$($(VENV)-frameworks/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(VENV)-frameworks/bin/pip install --quiet --no-deps -r constraints-frameworks.txt
	touch $@

frameworks: $(VENV)-frameworks/.installed  ## run nnU-Net, MONAI's engines, Lightning, Transformers and Accelerate
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/frameworks OMP_NUM_THREADS=1 $(VENV)-frameworks/bin/python -m pytest -n 2 --dist worksteal tests/frameworks

mutants: $(VENV)/.installed  ## make small faults in the package, one at a time, and list those that no test notices (slow)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

demo: $(VENV)/.installed  ## train a UNet and a KAF-UNet on synthetic volumes, compare them, draw outputs/demo.png
	$(BIN)/python -m examples.protocol.demo

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.installed  ## run the code on the pages, then build the site into outputs/site; any warning is an error
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_pages.py
	$(BIN)/mkdocs build --strict

benchmarks: $(VENV)/.installed  ## every benchmark at a small size, into outputs/benchmarks
	$(BIN)/python benchmarks/flops.py --edges 128 256 --attentions 20
	$(BIN)/python benchmarks/memory.py --edges 128 256 --attentions 20
	$(BIN)/python -m benchmarks.speed.layers --parts diffusion --edges 64 --repeats 3
	$(BIN)/python -m benchmarks.context.synthetic --steps 20 --images 100 --output outputs/benchmarks/context
	$(BIN)/python -m benchmarks.context.addition --steps 5 --images 20
	$(BIN)/python -m benchmarks.detection.images --only agreement
	$(BIN)/python -m benchmarks.detection.matching --only sinkhorn --points 128 --repeats 3

gpu:  ## on a machine with a GPU: tests, times, peak memory and trainings, or PART="diffusion network" of it
	$(PYTHON) -m benchmarks.speed.gpu $(PART)

lint: $(VENV)/.installed  ## ruff: rules and format; spelling; the workflows' security
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/zizmor --offline --quiet .github

types: $(VENV)/.installed  ## mypy --strict on the package, the examples and the benchmarks
	$(BIN)/mypy

build: $(VENV)/.installed  ## sdist and wheel, checked, the wheel imported in an empty environment
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear dist/venv
	dist/venv/bin/pip install --quiet -c constraints.txt torch
	dist/venv/bin/pip install --quiet -c constraints.txt dist/*.whl
	cd dist && venv/bin/python -W error -c "import kaf_layer; print('kaf_layer', kaf_layer.__version__)"

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-frameworks dist outputs .coverage .pytest_cache .mypy_cache .ruff_cache
