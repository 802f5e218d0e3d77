# make demo     train a ViT on real digits, then see what every method does to it
# make test     lint, then the tests that are short
# make test-all lint, then all tests: also kills, meshes, whole runs and sweeps, compilers
# make bench    time primitives, methods, ViTs under every method, and decoding on this device
# make real     fetch pretrained weights and data, and measure every reduction on them (hours;
#               QUICK=1: minutes)
# make targets  compile for TPUs and GPUs that nobody here owns
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
PY := $(VENV)/bin/python
# A worker of the tests takes up to 3 GB.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

.PHONY: demo test test-all lint bench real targets clean

demo: $(VENV)/.installed
	$(PY) -m train --config=configs/digits.py --workdir=$(RUNS)/digits
	$(PY) -m eval --config=configs/digits_sweep.py --workdir=$(RUNS)/digits

test: lint
	$(PY) -m pytest -n $(JOBS) --durations=10 -m 'not long'

test-all: lint
	$(PY) -m pytest -n $(JOBS) --durations=10

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy ops models lib

bench: $(VENV)/.installed
	$(PY) -m tools.bench
	$(PY) -m tools.speed
	$(PY) -m tools.decode_bench

real: $(VENV)/.installed-real
	$(PY) -m tools.real $(if $(QUICK),--quick)

targets: $(VENV)/.installed-targets
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(PY) -m tools.targets
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(PY) -m tools.targets_lm

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.installed-real: $(VENV)/.installed requirements-real.txt requirements-hub.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-real.txt
	touch $@

$(VENV)/.installed-targets: $(VENV)/.installed requirements-targets.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-targets.txt
	touch $@

clean:
	rm -rf $(VENV) $(RUNS) data
