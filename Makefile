# make setup    everything into .venv and build/, nothing outside; a second time takes a second
# make demo     what this project does, in a few minutes       make demo TEXT=book.txt   with a text of yours
# make test     C++ tests under sanitizers, then pytest        make test PYTEST='-k memory'
# make cuda     the CUDA kernel for every GPU; needs nvcc      make cuda-jetson          for Jetson, on another processor
# make wheels   wheels for every Python, into dist/            make abi                  describes titans.h anew
# make bench    speed, side by side, on an idle machine (about half an hour)             make bench BENCH='--rounds 5'
# make fuzz     bundles, states and calls made up by libFuzzer; needs clang              make fuzz SECONDS=3600
# make lint     formatting, lints and types                    make format               mends what can be mended
# make clean    removes .venv, .deps and build/
#
# PYTHON names another Python, CXX another compiler, JOBS how many compiles run at a time; pip's own settings (PIP_*)
# and configuration hold as they are, so a machine can choose where packages come from.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
STAMPS := $(VENV)/stamps
TEST_BUNDLE := build/test/synthetic.titans
MODEL_BUNDLE := build/test/mac-bytes.titans
# The ONNX Runtime that is installed in .venv, for C++ programs.
ONNXRUNTIME = $(shell $(VENV)/bin/python -c 'from titans_runtime._library import backend_library as b; print(b() or "")')
# What is installed in .venv comes before what the machine has, as with an activated environment.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)

# $(call install,WHAT): pip, telling what takes time; all it says is in build/setup.log, and on the screen if it fails.
define install
mkdir -p build; \
$(VENV)/bin/python -m pip install --no-build-isolation --constraint constraints.txt $(1) 2>&1 | tee build/setup.log | \
  sed -un 's/^ *\(Downloading [^ ]*\.whl.*\|Building .* still running.*\|Installing collected packages: .*\)/  \1/p' | cut -c 1-110 || \
  { tail -n 60 build/setup.log; echo "[setup] pip failed; all of its output is in build/setup.log"; exit 1; } >&2
endef

# $(call build_preset,PRESET,TARGET): quietly, unless it fails.
define build_preset
{ cmake --preset $(1) && cmake --build --preset $(1) --target $(2); } >build/$(1).log || { cat build/$(1).log; exit 1; }
endef

RUNTIME_SOURCES := CMakeLists.txt $(shell find runtime cmake plugins -type f \
  -not -path '*/__pycache__/*' -not -path 'runtime/python/build/*' 2>/dev/null)
CXX_SOURCES = $(shell find runtime plugins tests examples benchmarks -type f \
  \( -name '*.h' -o -name '*.hpp' -o -name '*.c' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
PY_SOURCES = titans_export tests examples runtime/python tools benchmarks calibration

.PHONY: help setup run-setup kernels cuda cuda-jetson wheels abi test test-cpp test-python fuzz lint format demo bench clean

help:
	@sed -n '1,/^$$/{s/^# \{0,1\}//p}' Makefile | sed '/^SHELL/,$$d'

# ---- setting up: each step leaves a stamp, and runs again only when what it depends on has changed ----

setup: run-setup $(STAMPS)/dev

run-setup: $(STAMPS)/runtime $(STAMPS)/export

$(STAMPS)/venv:
	@fail() { echo "[setup] expected $$1 but got $$2; $$3" >&2; exit 1; }; \
	command -v $(PYTHON) >/dev/null || fail "Python 3.10 or newer" "no $(PYTHON)" "install it or pass PYTHON=/path/to/python3"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  fail "Python 3.10 or newer" "$$($(PYTHON) --version)" "pass PYTHON=/path/to/python3"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  fail "Python's venv module" "none" "install it (Debian and Ubuntu: apt install python3-venv)"; \
	for language in c c++; do \
	  case $$language in c) tool="$(CC)"; flag=-std=c11 ;; *) tool="$(CXX)"; flag=-std=c++17 ;; esac; \
	  echo 'int main(void) { return 0; }' | $$tool $$flag -x $$language -fsyntax-only - 2>/dev/null || \
	    fail "a C++17 compiler (and C11)" "no $$tool that takes $$flag" "install one (Debian and Ubuntu: apt install g++) or pass CXX=... CC=..."; \
	done
	@echo "[setup] Python environment in $(VENV) (about 5 s)"
	@$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

# CMake of the machine does, where it is new enough. Ninja comes with packages of a later step anyway, and compiles anew
# what another version of it has compiled.
$(STAMPS)/tools: constraints.txt | $(STAMPS)/venv
	@echo "[setup] build tools (about 10 s)"
	@wanted="scikit-build-core ninja"; \
	cmake --version 2>/dev/null | sed -n 's/^cmake version //p;q' | { read -r found || true; \
	  printf '3.22\n%s\n' "$${found:-0}" | sort -V -C; } || wanted="$$wanted cmake"; \
	$(call install,$$wanted)
	@touch $@

$(STAMPS)/headers: tools/fetch_deps | $(STAMPS)/venv
	@echo "[setup] third-party headers into .deps (about 20 s)"
	@tools/fetch_deps
	@touch $@

# Build files stay in build/runtime, so that a changed source compiles alone.
$(STAMPS)/runtime: $(RUNTIME_SOURCES) | $(STAMPS)/tools $(STAMPS)/headers
	@echo "[setup] the runtime: libtitans.so and its Python binding (first build about 60 s)"
	@$(call install,--force-reinstall --no-deps --config-settings=build-dir=$(CURDIR)/build/runtime ./runtime/python)
	@touch $@

$(STAMPS)/export: pyproject.toml constraints.txt | $(STAMPS)/runtime
	@echo "[setup] titans-export with PyTorch and ONNX Runtime (about 60 s, most of it PyTorch)"
	@$(call install,--editable .)
	@touch $@

$(STAMPS)/dev: pyproject.toml constraints.txt | $(STAMPS)/export
	@echo "[setup] tools for tests and lints (about 15 s)"
	@$(call install,--editable '.[dev]')
	@touch $@

# ---- working ----

demo: run-setup
	@$(VENV)/bin/python examples/demo.py $(if $(TEXT),--text '$(TEXT)')

test: test-cpp test-python

test-cpp: setup $(TEST_BUNDLE) $(MODEL_BUNDLE)
	@echo "[test] C++ tests under the address and undefined behaviour sanitizers (first build about 3 min)"
	@cmake --preset sanitize >build/sanitize.log || { cat build/sanitize.log; exit 1; }
	@cmake --build --preset sanitize
	@TITANS_TEST_BUNDLE=$(CURDIR)/$(TEST_BUNDLE) TITANS_ONNXRUNTIME=$(ONNXRUNTIME) \
	  ctest --preset sanitize
	@echo "[test] threads, under the thread sanitizer (first build about 2 min)"
	@$(call build_preset,tsan,titans_thread_tests)
	@build/tsan/tests/cpp/titans_thread_tests --gtest_brief=1
	@echo "[test] the kernel inside the runtime, on an exported model"
	@TITANS_TEST_BUNDLE=$(CURDIR)/$(MODEL_BUNDLE) TITANS_ONNXRUNTIME=$(ONNXRUNTIME) \
	  build/sanitize/tests/cpp/titans_onnxruntime_tests --gtest_brief=1

# A small model that the C++ tests can run on ONNX Runtime.
$(TEST_BUNDLE): tests/support/synthetic.py | setup
	@rm -rf $@ && mkdir -p $(dir $@)
	@PYTHONPATH=tests/support $(VENV)/bin/python -c "import pathlib, synthetic as s; \
	  s.write_bundle(pathlib.Path('$@'), s.Weights.random())"

# Programs around the bare kernels: the CPU's from the objects of the runtime's own build, for aarch64 where there is a
# compiler; CUDA's emulated on the CPU where its headers and Boost.Context are, for all GPUs where nvcc is.
NVCC := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
EMULATION := $(and $(wildcard $(dir $(NVCC))../include/cuda_fp16.h /usr/local/cuda*/include/cuda_fp16.h),$(wildcard \
  /usr/include/boost/context/fiber.hpp))
kernels: $(STAMPS)/kernels $(if $(shell command -v aarch64-linux-gnu-g++),$(STAMPS)/kernels-aarch64) \
  $(if $(EMULATION),$(STAMPS)/kernels-emulation) $(if $(NVCC),cuda)

$(STAMPS)/kernels: $(RUNTIME_SOURCES) | $(STAMPS)/runtime
	@cmake --build build/runtime --target neural_memory_run >build/kernels.log || { cat build/kernels.log; exit 1; }
	@touch $@

# The kernels are optimised, as in a release; the rest is compiled quickly, as the tests of it take seconds.
AARCH64_TARGETS := neural_memory_run titans_tests titans_kernel_tests titans_cuda_plan_tests titans_onnxruntime_tests \
  titans_stream_exchange titans_onnxruntime_ops
$(STAMPS)/kernels-aarch64: $(RUNTIME_SOURCES) $(shell find tests/cpp -type f) | $(STAMPS)/tools $(STAMPS)/headers $(STAMPS)/aarch64
	@echo "[test] the runtime and its C++ tests for aarch64 (first build about 3 min)"
	@$(call build_preset,aarch64,$(AARCH64_TARGETS))
	@touch $@

# Tests that lack the emulator or ONNX Runtime are skipped.
$(STAMPS)/aarch64: constraints.txt tools/fetch_aarch64 tools/fetch_debs | $(STAMPS)/venv
	@rm -rf .deps/aarch64/lib
	@PYTHON=$(VENV)/bin/python tools/fetch_aarch64 && touch $@ || echo "[test] less is tested for aarch64"

KERNEL_SOURCES := CMakeLists.txt $(shell find cmake plugins/kernels plugins/tools tests/cuda_emulation -type f 2>/dev/null)

$(STAMPS)/kernels-emulation: $(KERNEL_SOURCES) | $(STAMPS)/tools $(STAMPS)/headers
	@echo "[test] the CUDA kernel to run on the CPU (first build about 30 s)"
	@$(call build_preset,emulation,neural_memory_run_cuda_emulated)
	@touch $@

cuda: $(STAMPS)/cuda

$(STAMPS)/cuda: $(KERNEL_SOURCES) | $(STAMPS)/tools $(STAMPS)/headers
	@echo "[cuda] the CUDA kernel for every GPU (first build about 3 min)"
	@$(call build_preset,cuda,neural_memory_run_cuda)
	@touch $@

# For Jetson, on another processor: compiled only. TENSORRT_ROOTS=A:B for the plugin with the headers in A/include and
# B/include; it and the TensorRT backend go to build/cuda-aarch64/lib.
CUDART_VERSION = $(shell $(NVCC) --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
cuda-jetson: | $(STAMPS)/tools $(STAMPS)/headers
	@test -n "$(NVCC)" || { echo "[cuda] expected nvcc but got none; do install a CUDA toolkit" >&2; exit 1; }
	@echo "[cuda] the CUDA kernel for aarch64, sm_87 and sm_110 (first build about 3 min)"
	@PYTHON=$(VENV)/bin/python tools/fetch_aarch64 --cuda $(CUDART_VERSION)
	@mkdir -p build; roots="$(subst :, ,$(TENSORRT_ROOTS))"; for root in $${roots:-$(TENSORRT_ROOT) none}; do \
	  test $$root = none && root= && targets=neural_memory_run_cuda || \
	    targets="neural_memory_run_cuda titans_tensorrt_plugin titans_backend_tensorrt"; \
	  { cmake --preset cuda-aarch64 -DTITANS_CUDART=$(CURDIR)/.deps/aarch64/cuda-$(CUDART_VERSION) -DTENSORRT_ROOT=$$root && \
	    cmake --build --preset cuda-aarch64 --target $$targets; } >build/cuda-aarch64.log || { cat build/cuda-aarch64.log; exit 1; }; \
	done

$(MODEL_BUNDLE): $(STAMPS)/runtime $(STAMPS)/dev $(shell find titans_export/model titans_export/onnx -name '*.py')
	@mkdir -p $(dir $@)
	@$(VENV)/bin/titans-export export examples/checkpoints/mac-bytes -o $@ --chunks-per-call 1 --overwrite

# Most of pytest's time is tracing, which takes one core; each worker takes 1 to 2 GiB. WORKERS=0 runs all in one process.
WORKERS ?= $(shell echo $$(( $$(nproc) < 4 ? $$(nproc) : 4 )))
test-python: setup kernels
	@echo "[test] pytest, on $(WORKERS) of $(shell nproc) cores"
	@$(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST)

# For this processor and, where there is a compiler, for aarch64.
wheels: setup
	@tools/wheels export native $(if $(shell command -v aarch64-linux-gnu-g++),aarch64)

# tests/project/test_abi.py fails where titans.h breaks programs that were compiled with what is described.
abi:
	@tools/abi write

# libFuzzer comes with clang, in a package of its own on some systems.
SECONDS ?= 60
fuzz: $(STAMPS)/tools $(STAMPS)/headers
	@if ! echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' | \
	  clang++ -fsanitize=fuzzer,address -x c++ - -o /dev/null 2>/dev/null; then \
	  echo "[fuzz] skipped: no clang++ with libFuzzer (Debian and Ubuntu: apt install clang libclang-rt-dev)"; exit; fi; \
	echo "[fuzz] building (first build about 4 min)"; mkdir -p build; $(call build_preset,fuzz,titans_fuzz); \
	echo "[fuzz] $(SECONDS) s of each target"; JOBS=$(JOBS) tests/fuzz/run build/fuzz $(SECONDS)

# The numbers go to benchmarks/results, and from there into docs/benchmarks.md.
bench: setup kernels $(STAMPS)/bench build/bench/bandwidth
	@$(VENV)/bin/python -m benchmarks.layer $(BENCH) -o benchmarks/results/cpu-layer-$(shell date -u +%F).json
	@$(VENV)/bin/python -m benchmarks.models $(BENCH)
	@$(VENV)/bin/python -m benchmarks.plot
	@$(VENV)/bin/python -m benchmarks.table

$(STAMPS)/bench: pyproject.toml constraints.txt | $(STAMPS)/dev
	@echo "[bench] what is measured beside ours, and what draws (about 20 s)"
	@$(call install,--editable '.[bench]')
	@touch $@

# For this very machine: it finds the limits of the machine it runs on.
build/bench/bandwidth: benchmarks/bandwidth.cc
	@mkdir -p build/bench
	@$(CXX) -std=c++17 -O3 -march=native -pthread $< -o $@

lint: setup
	@echo "[lint] ruff"
	@ruff check $(wildcard $(PY_SOURCES))
	@ruff format --check $(wildcard $(PY_SOURCES))
	@echo "[lint] mypy (first time about 60 s)"
	@mypy
	@echo "[lint] clang-format"
	@clang-format --dry-run -Werror $(CXX_SOURCES)

format: setup
	@ruff check --fix-only $(wildcard $(PY_SOURCES))
	@ruff format $(wildcard $(PY_SOURCES))
	@clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) .deps build
