# Every target makes its own virtual environment where it is missing; where it is there, nothing is installed again.
# To use an environment of your own (a cluster's module, a container), name its Python: make test PY=python3

PYTHON ?= python3
VENV ?= .venv
DEMO_FLAGS ?= --model e1 --params 1m --depth 2 --seq-len 128 --batch-size 32 --lr 3e-3 --warmup 20 \
	--time-limit 100s --eval-every 200 --eval-bytes 200k
# A process a core; on a GPU machine they share the GPU. Each has tests that stand together, which share what they set up.
TEST_FLAGS ?= -n auto --maxprocesses 8 --dist worksteal

ifdef PY
INSTALLED :=
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

.PHONY: demo test check format docs install clean

demo: $(INSTALLED)
	$(PY) -m elman train $(DEMO_FLAGS)

test: $(INSTALLED)
	$(PY) -m pytest $(TEST_FLAGS)

check: $(INSTALLED)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q $(TEST_FLAGS)

format: $(INSTALLED)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# The site, in site/: open site/index.html. A warning is an error.
docs: $(INSTALLED)
	$(PY) -m docs.assemble build/docs
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -c docs build/docs site

install: $(INSTALLED)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "elman needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
