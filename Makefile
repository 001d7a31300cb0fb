# make demo     complete a hole in examples/ with the embedded model     make test    the whole suite
# make install  .venv with everything in it                               make check   format, lint, types, layers
PYTHON ?= python3
PIP_OPTIONS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test check
install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "deepseek-lsp needs Python 3.11 or newer; run: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/deepseek-lsp complete examples/inventory.py:24 --type r

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
