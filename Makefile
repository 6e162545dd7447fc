# The verbs of this tree. `make demo` and `make test` need Python >= 3.11 and make, and nothing else:
# each makes .venv where it is missing and installs what it needs. PYTHON=/path/to/python chooses the
# interpreter of a new .venv, CUDA_EXTRA=cuda12 the CuPy of the GPU verbs. ARGS is handed on:
# make test ARGS="-k align", make demo ARGS="--help".

VENV := .venv
BIN := $(VENV)/bin
CUDA_EXTRA ?= cuda13
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# libgomp's spinning threads and OpenBLAS's own would fight for the cores with the test workers
TEST_ENV := OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1

CUDA_SOURCES := $(wildcard rawkernels/*.cu rawkernels/*.cuh)
NOTEBOOKS := $(wildcard notebooks/*.py)

.PHONY: help demo test test-gpu sanitize compile lint bench readme notebooks install clean

help:
	@echo "make demo       run one Mixture-of-Experts layer of a real size, check it, print its table"
	@echo "make test       run every test"
	@echo "make test-gpu   run the tests that need a GPU"
	@echo "make sanitize   run every kernel under compute-sanitizer"
	@echo "make compile    build the GPU kernels ahead: ARGS=\"--arch sm_90a --output DIR\""
	@echo "make lint       ruff, clang-format, codespell, mypy"
	@echo "make bench      measure; writes benchmarks/results"
	@echo "make readme     fill the README's tables from the measurements"
	@echo "make notebooks  rebuild and run the notebooks"
	@echo "make install    everything of the above into .venv"
	@echo "make clean      remove what was built; .venv stays"

demo: $(VENV)/.base
	$(BIN)/cumoe demo $(ARGS)

test: $(VENV)/.test
	$(TEST_ENV) $(BIN)/pytest -n auto $(ARGS)

# -k: the bodies that the xp fixture runs on CuPy, and the files that need a GPU throughout
test-gpu: $(VENV)/.test $(VENV)/.$(CUDA_EXTRA)
	$(TEST_ENV) $(BIN)/pytest -n 4 -k "cupy or cuda or gpu or test_load or large_layers" $(ARGS)

sanitize: $(VENV)/.test $(VENV)/.$(CUDA_EXTRA)
	$(BIN)/python tests/sanitize_kernels.py $(ARGS)

compile: $(VENV)/.compile
	$(BIN)/cumoe compile $(ARGS)

lint: $(VENV)/.lint build/typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CUDA_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES))
	$(BIN)/codespell
	cd build/typing && ../../$(BIN)/mypy --config-file ../../.mypy.ini -p cumoe

bench: $(VENV)/.test
	$(BIN)/cumoe bench $(ARGS)

readme: $(VENV)/.base
	$(BIN)/python benchmarks/readme.py

# the .py files are the source; the .ipynb files beside them are rebuilt without outputs and run
notebooks: $(VENV)/.notebook
	$(if $(NOTEBOOKS),$(BIN)/jupytext --update --to notebook $(NOTEBOOKS))
	$(if $(NOTEBOOKS),MPLBACKEND=agg $(TEST_ENV) $(BIN)/pytest --nbmake --nbmake-timeout=300 $(NOTEBOOKS:.py=.ipynb))

install: $(VENV)/.base $(VENV)/.test $(VENV)/.lint $(VENV)/.notebook

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# One stamp for each set of extras, so that a second run installs nothing and needs no network.
$(addprefix $(VENV)/.,base test lint notebook compile cuda12 cuda13): $(VENV)/.%: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.$(if $(filter base,$*),,[$*])'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "cumoe needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Type checkers do not run import hooks, so they see the folders as the installed package has them.
.PHONY: build/typing
build/typing:
	rm -rf build/typing && mkdir -p build/typing/cumoe
	ln -s "$(CURDIR)"/cumoe/* "$(CURDIR)/cpu" "$(CURDIR)/rawkernels" build/typing/cumoe/
