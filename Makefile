# make venv    the development environment, in .venv
# make demo    install, then train a model on an emulated fleet, end to end
# make test    install, then lint, type-check and test
# make test-slow    the tests that take long and rarely break, as root for those of bad links
# make onnxruntime-training    the engine of that name, in a folder of its own
# make aarch64    train on arm64 under emulation; needs qemu-user-static and debootstrap
# make zoo     compile what people bring, on both engines, and write docs/models.md; takes most of an hour
# make bench   every benchmark, as tables
# make lint    format check, lint, types, layers

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ROOMS := cli datasets device_runtime emulator exporter protocol server
# One thread a process: the ExecuTorch runtime is 40 to 80 times slower on contended cores otherwise.
export OMP_NUM_THREADS := 1

# The package takes the place of onnxruntime, so it gets a folder of its own: PYTHONPATH=build/onnxruntime-training.
# 1.19.2 is the last release; it has wheels for x86-64 and Python up to 3.11.
ORT_TRAINING := build/onnxruntime-training

.PHONY: venv demo test test-slow zoo bench lint clean onnxruntime-training aarch64

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

onnxruntime-training: $(ORT_TRAINING)/.installed

$(ORT_TRAINING)/.installed: venv
	-$(BIN)/python -m pip install --quiet --no-deps --target $(ORT_TRAINING) onnxruntime-training-cpu==1.19.2
	mkdir -p $(ORT_TRAINING) && touch $@

aarch64: venv
	PYTHON=$(BIN)/python tests/aarch64/make_root.sh build/aarch64
	FROSTLINE_AARCH64_ROOT=build/aarch64 $(BIN)/pytest -rP tests/aarch64

demo: venv
	$(BIN)/frostline emulate --config examples/quickstart.toml

# Tests that compute and nothing else, so two files at a time; the others run servers and brokers against the clock.
PARALLEL := tests/exporter tests/zoo tests/emulator tests/device_runtime/test_engines.py \
	$(addprefix tests/server/test_,schedule.py width_scaling.py) \
	$(addprefix tests/end_to_end/test_,bad_input.py export.py simulate.py)

test: lint onnxruntime-training
	$(BIN)/pytest -n 2 --dist loadfile $(PARALLEL)
	$(BIN)/pytest $(addprefix --ignore=,$(PARALLEL))

# What takes long and rarely breaks: bad links (as root), a cluster of brokers, every built-in model on every engine.
test-slow: onnxruntime-training
	$(BIN)/pytest -m slow

zoo: venv
	$(BIN)/python -m tests.zoo.run --table docs/models.md --json build/zoo.json

bench: venv
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	mkdir -p build/typecheck/frostline
	for room in $(ROOMS); do ln -sfn ../../../$$room build/typecheck/frostline/$$room; done
	cd build/typecheck && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p frostline

clean:
	rm -rf build $(VENV)
