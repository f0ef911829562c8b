# make setup      everything into .venv, .deps and build/, nothing outside; a second time takes a second
# make demo       exports two small models and runs them        make demo TEXT=book.txt   with a text of yours
# make test       every feature once, about 15 minutes          make test PYTEST='-k memory'
# make test-all   every test, build and fuzz target, about 40 minutes
# make fuzz       each fuzz target for a minute; needs clang    make fuzz SECONDS=3600
# make bench      speed beside the baselines, on an idle machine (about half an hour)    make bench BENCH='--rounds 5'
# make lint       formatting, lints and types                   make format               fixes what formatters can fix
# make cuda       the CUDA kernel for every GPU; needs nvcc     make cuda-jetson          for Jetson, on another processor
# make kernels    programs around the kernels, for single tests and benchmarks
# make dist       the C library for embedding, an archive for this processor, into dist/
# make wheels     wheels for every Python, into dist/           make abi                  renews the description of titans.h
# make clean      removes .venv, .deps and build/
#
# PYTHON names another Python, CC and CXX other compilers, JOBS how many compiles run at a time. pip's settings (PIP_*)
# stay as they are, so a machine can choose where packages come from. A target is one script of tools/.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help setup demo test test-cpp test-python test-all test-rest fuzz bench lint format kernels cuda cuda-jetson wheels dist abi clean
.NOTPARALLEL:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup:
	@tools/setup

demo:
	@tools/setup run
	@.venv/bin/python examples/demo.py $(if $(TEXT),--text '$(TEXT)')

test:
	@tools/test cpp python -- $(PYTEST)

test-cpp:
	@tools/test cpp

test-python:
	@tools/test python -- $(PYTEST)

# What test-all has and test has not.
test-rest:
	@tools/test rest -- $(PYTEST)

test-all:
	@tools/test cpp python rest -- $(PYTEST)

fuzz: setup
	@tools/fuzz $(SECONDS)

bench:
	@tools/bench $(BENCH)

lint: setup
	@tools/lint

format: setup
	@tools/lint --fix

kernels: setup
	@tools/build kernels emulation cuda-two aarch64

cuda: setup
	@tools/build cuda

cuda-jetson: setup
	@tools/build cuda-jetson

dist: setup
	@tools/dist

# For this processor and, if there is a compiler, for aarch64.
wheels: setup
	@tools/wheels export native $(if $(shell command -v aarch64-linux-gnu-g++),aarch64)

abi:
	@tools/abi write

clean:
	rm -rf .venv .deps build
