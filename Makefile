# Everything works from a bare checkout: each target first makes .venv, installs what it needs and builds the native
# libraries. Stamp files remember what is done, so a second run starts at once.
#
#   PYTHON=python3.12           the interpreter .venv is made with
#   GAPKERN_CUDA=auto|on|off    build the CUDA library (auto: when nvcc is found)
#   TORCH_CUDA_ARCH_LIST=9.0a   CUDA architectures      MAX_JOBS=2   parallel compilations
#   CUTLASS_PATH=               CUTLASS's headers, instead of installing $(CUTLASS)
#   TEST_WORKERS=2              processes that share the tests; TEST_ARGS="-n 0 --pdb" runs them in this one
#   DIST=dist                   where make wheel puts what it makes
#   DEMO_ARGS=  TEST_ARGS=  BENCH_ARGS=  FUZZ_ARGS=     passed on to the command
PYTHON ?= python3
VENV ?= .venv
TEST_WORKERS ?= 2
DIST ?= dist
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# What is installed without its requirements is no conflict. Modules are compiled as they are imported: few of them are.
INSTALL := $(PIP) install --no-warn-conflicts --no-compile

# Where nvcc is found, CUTLASS's headers are installed for the Hopper kernels. The wheel's own requirements are heavy and
# not needed to compile, so that it cannot be among pyproject.toml's.
CUTLASS := nvidia-cutlass==4.2.0.0
NVCC := $(or $(CUDACXX),$(shell PATH="$$CUDA_HOME/bin:$$CUDA_PATH/bin:$$PATH:/usr/local/cuda/bin" command -v nvcc))
HEADERS := $(if $(filter off OFF Off,$(GAPKERN_CUDA)),,$(if $(NVCC),$(if $(CUTLASS_PATH),,$(STAMPS)/$(CUTLASS))))

NATIVE := $(shell find csrc cmake -type f) CMakeLists.txt setup.py gapkern/_version.py
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
DEVICE := $(shell find tests/software_gpu tests/simt -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
SETTINGS := GAPKERN_CUDA=$(GAPKERN_CUDA) ARCH=$(TORCH_CUDA_ARCH_LIST) CXX=$(origin CXX):$(CXX) CUDACXX=$(CUDACXX) \
            CUTLASS=$(CUTLASS_PATH)

# Modules are compiled once and kept, wherever the caller says otherwise: compiling PyTorch's takes as long as importing
# them, in every process that a test starts.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow fuzz sanitize lint mypy format bench docs build prepared wheel clean distclean FORCE

help:
	@echo "make demo       train on handwritten digits, measure the modality gap, close it, write a report"
	@echo "make test       the tests, but for the slow ones"
	@echo "make test-slow  the slow tests: several processes, kills, whole runs, planted mistakes"
	@echo "make fuzz       damaged files, hostile command lines, killed runs, full disks (FUZZ_ARGS=--help lists options)"
	@echo "make sanitize   the CPU library's tests under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make lint       ruff, clang-format, mypy, workflows; fails on any difference (make format mends what it can)"
	@echo "make bench      time the kernels against plain PyTorch and open_clip"
	@echo "make docs       the documentation as a site, in build/docs; warnings are errors"
	@echo "make build      set up $(VENV) and build the native libraries there"
	@echo "make wheel      a wheel for this platform and every Python >= 3.10, and an sdist, in $(DIST)"
	@echo "make clean      remove what was built; make distclean removes $(VENV) too"

demo: build $(STAMPS)/packages-demo
	$(BIN)/gapkern demo $(DEMO_ARGS)

test: prepared
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow" $(TEST_ARGS)

test-slow: prepared
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m slow $(TEST_ARGS)

fuzz: build $(STAMPS)/packages-test
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)
	$(if $(FUZZ_ARGS),,$(BIN)/python -m tests.disasters)

sanitize: build $(STAMPS)/packages-test
	$(BIN)/python tests/sanitize.py $(TEST_ARGS)

bench: build $(STAMPS)/packages-test
	$(BIN)/python bench/run.py $(BENCH_ARGS)

docs: build $(STAMPS)/packages-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "docs: build/docs/index.html"

build: $(STAMPS)/build

prepared: build $(STAMPS)/packages-test $(STAMPS)/device

# The objects are those of `make build`; setuptools' copy of the sources is made anew, since it keeps what is no more.
# PyTorch's libraries stay outside: the process that loads ours has them. auditwheel names the oldest glibc that serves.
wheel: build $(STAMPS)/packages-wheel
	@rm -rf build/lib build/lib.* build/bdist.* build/wheel $(DIST)/gapkern-*
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	@mkdir -p $(DIST)
	@if [ "$$(uname)" != Linux ]; then cp build/wheel/*.whl $(DIST); else PATH="$(abspath $(BIN)):$$PATH" \
	  $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir $(DIST) build/wheel/*.whl; fi
	@$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('$(DIST)')" >build/wheel/sdist.log
	@ls -sh $(DIST)

lint: build $(STAMPS)/packages-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/mypy

mypy: build $(STAMPS)/packages-lint
	$(BIN)/mypy

format: build $(STAMPS)/packages-lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info gapkern/lib $(STAMPS)/build $(STAMPS)/packages-*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find gapkern tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("gapkern: needs Python >= 3.10, but \
	$(PYTHON) is " + sys.version.split()[0] + "; name another one, as in: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(@D) && touch $@

# The build requirements are installed first and pip's build isolation is off: an isolated build would download
# PyTorch a second time.
$(STAMPS)/requirements: pyproject.toml .ci/requirements.py $(STAMPS)/venv
	@echo "Installing PyTorch and the build tools into $(VENV) (several GB the first time) ..."
	@$(BIN)/python .ci/requirements.py > $(STAMPS)/requirements.txt
	$(INSTALL) -r $(STAMPS)/requirements.txt
	@touch $@

$(STAMPS)/$(CUTLASS): | $(STAMPS)/requirements
	$(INSTALL) --no-deps $(CUTLASS)
	@touch $@

$(STAMPS)/settings: FORCE | $(STAMPS)/venv
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

$(STAMPS)/build: $(NATIVE) pyproject.toml $(STAMPS)/requirements $(STAMPS)/settings $(HEADERS)
	@echo "Building the native libraries ..."
	$(INSTALL) --no-build-isolation --no-deps -e .
	@sed -n 's/^-- \(gapkern: \)/\1/p' build/cmake-*/build.log
	@touch $@

# The tests' CUDA device of software, and the device kernels as C++; they too are kept and brought up to date.
$(STAMPS)/device: $(STAMPS)/build $(DEVICE)
	@echo "Building the tests' device ..."
	@$(BIN)/python -m tests.native
	@touch $@

# Packages whose metrics and losses ours must equal, and the Hugging Face hub's loader of kernels. They ask for much that
# these do not import; what they do import, the extra `test` has, and transformers and tokenizers, which belong together:
# 153 MB and 12 s in all.
WITHOUT_DEPENDENCIES := clip-benchmark==1.6.2 sentence-transformers==6.2.0 transformers==5.24.0 tokenizers==0.23.3 \
                        pytorch-metric-learning==2.9.0 lightly==1.6.0 kernels==0.17.2

# Beside a build, where make runs two jobs: no package is in both.
$(STAMPS)/packages-%: pyproject.toml .ci/requirements.py | $(STAMPS)/requirements $(HEADERS)
	@echo "Installing what 'make $*' needs ..."
	@$(BIN)/python .ci/requirements.py $* > $(STAMPS)/$*.txt
	$(INSTALL) -r $(STAMPS)/$*.txt
	$(if $(filter test,$*),$(INSTALL) --no-deps $(WITHOUT_DEPENDENCIES))
	@touch $@
