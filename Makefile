# Every target works on a fresh clone: what it needs is installed into .venv first. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
# Test processes, one thread each: a suite of small operators gains nothing from threads within one.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := qdm_cli kernels recipes tests

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check style recipes zoo bench bench-gpu tables wheel

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: $(STAMP) ## .venv with qdm (editable) and the development tools, from constraints.txt

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamp is touched last: an interrupted installation starts again.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: install ## compress a real small model to 4 bits, load it again, judge it (minutes on a CPU)
	$(BIN)/qdm run quickstart --out runs/quickstart

test: install ## the test suite on the CPU, WORKERS files at a time; PYTEST_ARGS="-k name" narrows it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: install ## ruff, mypy and the layer rules; changes nothing
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_layers.py

style: install ## fix what ruff can fix, and format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

recipes: install ## validate and smoke-run every shipped recipe
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && set -e && \
	for file in $$(find recipes -name '*.yaml' | sort); do \
		name=$${file#recipes/}; name=$${name%.yaml}; echo "== $$name" >&2; \
		$(BIN)/qdm validate "$$name"; \
		$(BIN)/qdm run "$$name" --smoke --out "$$out/$$name"; \
	done

zoo: install ## train the builtin models again (hours), resumably, in zoo-work/, and put them into the package
	@test -n "$$QDM_FASHION_MNIST" || test -d /usr/share/datasets/fashion-mnist || \
	{ echo "Fashion-MNIST is missing: apt-get install dataset-fashion-mnist, or set QDM_FASHION_MNIST to the folder of its *-ubyte.gz files" >&2; exit 3; }
	$(BIN)/python -m qdm_cli.engine.zoo.train_features --out zoo-work
	$(BIN)/python -m qdm_cli.engine.zoo.train_unet --out zoo-work
	cp -r zoo-work/fashion-features zoo-work/fashion-unet32 qdm_cli/engine/zoo/

# One thread for layers, as a CPU's figures are read; two for the whole U-Net. BENCH_ARGS adds options, such as BENCH_ARGS="--rounds 5".
bench: install ## timings on this CPU behind their gate: layers of SD1.5 and DiT, the SD1.5-shaped U-Net; then the tables
	$(BIN)/qdm bench sd15 dit256 --threads 1 --device cpu --out kernels/bench/results $(BENCH_ARGS)
	$(BIN)/qdm bench sd15 --only-denoisers --threads 2 --device cpu --out kernels/bench/results $(BENCH_ARGS)
	$(MAKE) tables

bench-gpu: install ## timings on this GPU behind their gate: layers of all models, whole denoisers; then the tables
	$(BIN)/qdm bench all --device cuda --out kernels/bench/results $(BENCH_ARGS)
	$(BIN)/python kernels/bench/bench_denoisers.py sd15 sdxl ldm4 dit256 flux --bits 8 4
	$(MAKE) tables

tables: install ## the tables and the plot of kernels/README.md, from kernels/bench/results
	$(BIN)/python kernels/bench/tables.py

wheel: install ## dist/qdm-*.whl
	$(BIN)/python -m build --wheel --no-isolation
