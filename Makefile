# make train export benchmark gate   runs a recipe from its images to its verdict
# make test                          runs the tests; make test-all those that take long, too
# RECIPE=... takes another recipe, VENV=... an environment of yours that has crqat's dependencies.

RECIPE ?= recipes/digits.yaml
VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2

# A VENV that was given and has crqat is used as it is; otherwise it is made, and made anew when pyproject.toml changes.
INSTALLED := $(VENV)/.crqat-installed
ifneq ($(origin VENV),file)
ifneq ($(wildcard $(VENV)/bin/crqat),)
INSTALLED := $(VENV)/bin/crqat
endif
endif

# This directory's crqat comes first, wherever the environment's own may point.
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
CRQAT := $(VENV)/bin/python -m crqat
# Without that path: pip would take the metadata it has left in src for an install, and not replace the environment's.
PIP := PYTHONPATH= $(VENV)/bin/python -m pip install --disable-pip-version-check
# mkdocs is installed when it is first asked for.
MKDOCS = { $(VENV)/bin/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null \
	|| $(PIP) -c constraints.txt -e '.[docs]'; } && NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs
# The tests of one file stay in one process, which makes its fixtures once.
PYTEST := $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25

# The stages follow each other, and nothing may run beside a measurement: in the order of the command line, also with -j.
.NOTPARALLEL:
.PHONY: help install train export benchmark gate test test-all test-arm test-versions lint docs docs-serve notebooks models bench-infer bench-train study bench-residual soak fuzz bench-export bench-ptq bench-rounding bench-advise bench-imagenet

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

install: $(INSTALLED) ## make the virtual environment

train: $(INSTALLED) ## train and quantize what RECIPE says
	$(CRQAT) train $(RECIPE)

export: $(INSTALLED) ## write one verified ONNX file per target
	$(CRQAT) export $(RECIPE)

benchmark: $(INSTALLED) ## measure the files on this machine
	$(CRQAT) benchmark $(RECIPE)

gate: $(INSTALLED) ## judge the results; the exit code is the verdict
	$(CRQAT) gate $(RECIPE)

test: $(INSTALLED) ## run the tests that do not take long; WORKERS=... processes
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED) ## run all tests
	$(PYTEST) $(ARGS)

test-arm: $(INSTALLED) ## run the tests on emulated ARM CPUs; downloads Debian's arm64 Python and aarch64 wheels once
	$(VENV)/bin/python -m bench.emulated_arm
	$(PYTEST) -m arm $(ARGS)

# In environments of its own, made by PYTHON.
test-versions: ## docs/versions.md: which versions of the libraries work; ARGS="--rows newest" for some; about 4 minutes a row
	$(PYTHON) -m bench.versions $(ARGS)

lint: $(INSTALLED) ## ruff, mypy --strict and the list of retired words
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m pytest -q tests/test_words.py
	$(VENV)/bin/python -m tests.typing_stubs  # TensorRT's, for mypy
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/python -m mypy --python-version 3.10 -p crqat.core -p crqat.runtime_eval  # what runs on a board

docs: $(INSTALLED) ## build the documentation site in build/site, warnings are errors
	$(MKDOCS) build --strict

docs-serve: $(INSTALLED) ## show the site on http://127.0.0.1:8000 and build it again whenever a page changes
	$(MKDOCS) serve

notebooks: $(INSTALLED) ## run the notebooks of docs/notebooks and store what they print
	$(VENV)/bin/python docs/site/run_notebooks.py docs/notebooks/*.ipynb

bench-train: $(INSTALLED) ## seconds of a training step: float, QAT, CR-QAT and the peers that are installed
	$(VENV)/bin/python -m bench.step_time $(ARGS)

study: $(INSTALLED) ## docs/study: training methods side by side from few labels, goes on where it was stopped; takes hours
	$(CRQAT) study recipes/study_resnet20_w4a4.yaml --seeds 0,1,2 --out docs/study/resnet20_w4a4.md $(ARGS)

bench-infer: $(INSTALLED) ## float, ours and ONNX Runtime's own quantization; ARGS="--cifar10 DIR --weights FILE" for accuracy
	$(VENV)/bin/python -m bench.vs_onnxruntime $(ARGS)

bench-residual: $(INSTALLED) ## TensorRT's plan with both inputs of a residual Add quantized, the skip branch alone, or none
	$(VENV)/bin/python -m bench.residual_add $(ARGS)

bench-export: $(INSTALLED) ## the peers' own ways to a quantized ONNX file and ours, in TensorRT's builder and ONNX Runtime
	$(VENV)/bin/python -m bench.vs_exporters $(ARGS)

bench-ptq: $(INSTALLED) ## seconds and memory from a float network to INT8 files: ours by step, and the peers that are installed
	$(VENV)/bin/python -m bench.calibration_time $(ARGS)

bench-advise: $(INSTALLED) ## every step of `crqat advise` on two CIFAR-10 networks at three bit widths; ARGS="WEIGHTS --cifar10 DIR"
	$(VENV)/bin/python -m bench.advise $(ARGS)

bench-imagenet: $(INSTALLED) ## ours and the peers' files of EfficientNet-Lite on photographs; ARGS="FOLDER"
	$(VENV)/bin/python -m bench.imagenet $(ARGS)

bench-rounding: $(INSTALLED) ## accuracy of few bits without training, ours and AIMET's; ARGS="WEIGHTS --cifar10 DIR" of a CIFAR-10 ResNet-20
	$(VENV)/bin/python -m bench.rounding $(ARGS)

models: $(INSTALLED) ## write docs/models.md, goes on where it was stopped; ARGS="timm/resnet18 --cifar10 DIR --engines" for some networks and real images
	$(CRQAT) models --size 64 --no-engines --resume $(ARGS) --out docs/models.md

soak: $(INSTALLED) ## kill 200 stages at random instants; ARGS="--kills 20" for fewer
	$(VENV)/bin/python -m bench.kill_and_resume $(ARGS)

fuzz: $(INSTALLED) ## every reader under a coverage-guided fuzzer; ARGS="--runs 1000000"
	$(VENV)/bin/python -c 'import atheris' || $(PIP) -e '.[fuzz]'
	$(VENV)/bin/python -m bench.fuzz_readers $(ARGS)

$(VENV)/.crqat-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[dev]'
	-$(PIP) --no-deps tensorrt-stubs==10.13.0.35.1  # not TensorRT
	touch $@
