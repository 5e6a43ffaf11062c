# make train: set up .venv once, then train and certify the embedded default
# make test:  set up .venv once, then run the tests
PYTHON ?= python3
READY := .venv/.ready

.PHONY: train test lint
train: $(READY)
	.venv/bin/python scripts/train_ccibp.py

test: $(READY)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

lint: $(READY)
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/pyright

# installs again only when the requirements change
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@
