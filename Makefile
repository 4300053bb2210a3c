# `make quickstart` and `make test` set up .venv by themselves, from the pinned files requirements.txt and
# requirements/dev.txt.
# Another Python: make PYTHON=python3.13 quickstart

PYTHON ?= python3
BIN := .venv/bin
WITH_TPU = TPU_LIBRARY_PATH=$(CURDIR)/.venv/tpu/libtpu/libtpu.so

.PHONY: install quickstart test test-slow test-all lint format lock clean

install: .venv/base.stamp

quickstart: .venv/base.stamp
	$(BIN)/lpl quickstart

test: .venv/dev.stamp lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Slow tests alone, or a part of them of at most 20 minutes: make PART=2/5 test-slow
test-slow: .venv/dev.stamp .venv/tpu.stamp
	$(WITH_TPU) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow $(if $(PART),--part $(PART))

test-all: .venv/dev.stamp .venv/tpu.stamp lint
	$(WITH_TPU) $(BIN)/python -m pytest -m "slow or not slow"

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins every package that base.in needs, for all supported Pythons in one file.
lock: .venv/dev.stamp
	$(BIN)/pip install --quiet uv==0.13.9
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-emit-index-url --no-emit-find-links --no-header \
		--upgrade requirements/base.in -o requirements.txt

clean:
	rm -rf .venv .pytest_cache .ruff_cache

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
		f"error: $(PYTHON) is Python {v[0]}.{v[1]}; lpl_jax needs 3.11, 3.12 or 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/base.stamp: .venv/python.stamp requirements.txt pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# libtpu, to compile for TPUs; outside the packages, as jax looks for a TPU at every start where it can import libtpu.
.venv/tpu.stamp: .venv/base.stamp requirements/tpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/tpu -r requirements/tpu.txt
	touch $@

.venv/dev.stamp: .venv/base.stamp requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	touch $@
