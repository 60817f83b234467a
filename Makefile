# `make demo` shows it working, `make test` proves it. Both set up what they need in .venv.

PYTHON ?= python3
ENV ?= local
TESTS ?= tests
VENV := .venv
READY := $(VENV)/.ready
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint lock bench clean

demo: $(READY)
	ENV=$(ENV) $(VENV)/bin/python examples/demo.py

test: $(READY)
	$(VENV)/bin/pytest -n 3 --dist worksteal -q $(TESTS)

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(READY)
	$(VENV)/bin/python benchmarks/setup_peers.py
	$(VENV)/bin/python benchmarks/compare.py

# Pins every dependency, with hashes and for every platform; no address of an index is written.
lock: $(READY)
	$(VENV)/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --extra dev \
	    --no-emit-index-url --no-header --upgrade pyproject.toml -o requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "Python's venv module is needed (on Debian and Ubuntu: the package python3-venv)"; exit 1; }
	@sed -n '/^uv==/,/^[a-z]/{/^uv==/p;/--hash/p;}' requirements.lock > $(VENV)/uv.lock
	$(PIP) --require-hashes -r $(VENV)/uv.lock
	@# uv takes seconds for what takes pip a minute, but does not read pip's configuration
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --require-hashes -r requirements.lock || \
	    $(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $(READY)

clean:
	rm -rf $(VENV) .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis
