# Everything a fresh clone needs: `make demo` and `make test` set up .venv by themselves.
#
#   make test PYTHON=/path/to/python3.12     another interpreter (3.11 or newer)
#   make test VENV=~/envs/work               an environment of yours, used as it is
#   make test TORCH_INDEX=URL                take torch from this package index.  Where the default
#                                            index carries the large CUDA build, name the index of
#                                            CPU builds that pytorch.org gives under "Get Started".
#   make test PYTEST_ARGS="-k qem -x"        anything for pytest

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_ARGS ?=
TORCH_INDEX ?=
BENCHMARKS := benchmarks/qem_speed.py benchmarks/posteriordb.py benchmarks/nuts_reference.py \
              benchmarks/qem_scale.py benchmarks/qem_paper benchmarks/gbp_pose_graphs.py \
              benchmarks/gbp_grids.py benchmarks/gbp_bundle.py benchmarks/amp_sparse.py \
              benchmarks/amp_glm.py benchmarks/amp_scale.py benchmarks/amp_phase.py

# More threads than this cost more than they give on tensors as small as those of the tests.
OMP_NUM_THREADS ?= 2
export OMP_NUM_THREADS

GIVEN := $(origin VENV)
VENV ?= .venv
PY := $(abspath $(VENV))/bin/python
STAMP := $(VENV)/.set-up
# An environment that the user names and that this file did not make is left as it is.
ifneq ($(GIVEN),undefined)
ifneq ($(wildcard $(VENV)/bin/python),)
ifeq ($(wildcard $(STAMP)),)
STAMP :=
endif
endif
endif

.PHONY: help demo test test-slow lint bench clean

help:
	@echo "make demo       fit a first model and print what comes out"
	@echo "make test       lint, types, then every quick test, doctest and tutorial"
	@echo "make test-slow  the long tests"
	@echo "make lint       ruff and mypy only"
	@echo "make bench      the benchmarks; one JSON line a run"
	@echo "make clean      remove build outputs and caches (.venv stays)"

demo: $(STAMP)
	$(PY) -m ppl demo

test: lint
	$(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

# mypy finds ppl.inference and ppl.models only where they stand inside ppl/: a tree of links says so.
lint: $(STAMP)
	$(PY) -m ruff check --output-format concise .
	@rm -rf build/types && mkdir -p build/types/ppl
	@cd build/types/ppl && ln -s ../../../ppl/* ../../../inference ../../../models .
	cd build/types && $(PY) -m mypy --config-file ../../pyproject.toml \
	    --cache-dir ../../.mypy_cache -p ppl

bench: $(STAMP)
	@set -e; for script in $(BENCHMARKS); do echo "# $$script"; $(PY) $$script; done
	@set -e; for table in step_time uci images cifar; do echo "# networks $$table"; \
	    $(PY) benchmarks/networks $$table; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find ppl inference models tests tutorials benchmarks -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone: the project's own range would admit any newer and larger build.
$(VENV)/.set-up: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PY) -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@
