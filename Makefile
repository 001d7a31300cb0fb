# make demo     complete a hole in examples/ with the embedded model     make test    the whole suite
# make install  .venv with everything in it                               make check   format, lint, types, layers
# make test-editors  real editors, fetched once into ~/.cache/deepseek-lsp/editors, with the real server
# make pictures  the screenshots in docs/pictures, anew
PYTHON ?= python3
PIP_OPTIONS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

EDITORS_INSTALLED := .venv/.editors-installed

.PHONY: install demo test test-editors pictures check
install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt model_host/native/forward.cpp model_host/native/build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "deepseek-lsp needs Python 3.11 or newer; run: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/deepseek-lsp complete examples/inventory.py:24 --type r

test: $(INSTALLED)
	$(BIN)/python -m pytest

$(EDITORS_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) --constraint constraints.txt --editable ".[dev,editors]"
	@touch $@

test-editors: $(EDITORS_INSTALLED)
	$(BIN)/python -m tests.editors.install
	$(BIN)/python -m pytest -rs --timeout 300 tests/editors

pictures: $(EDITORS_INSTALLED)
	EDITORS_PICTURES=docs/pictures $(BIN)/python -m pytest tests/editors -k "(tab or menu_switches or not_there or on_the_screen or remembers or goes_to_the_cursor or lsp4ij_asks) and not 0.10"

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
