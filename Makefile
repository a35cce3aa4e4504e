# make demo, make test, make docs, make bench: each makes its own virtual environment in .venv if there is none.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Python compiles a module when it is first imported, and keeps that whatever the user's shell says: the tests
# start a hundred processes. All modules at once, most of which nobody imports, would take a minute.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# One stamp for each set of packages: training needs no torch, the tests and benchmarks do.
CORE := $(VENV)/.core
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs

.PHONY: demo test pytest check docs bench bench-short bench-gpu clean

demo: $(CORE)
	$(RUN) examples/demo.py

# Side by side: they leave each other a core.
test: $(DEV)
	$(MAKE) --jobs=2 --output-sync=none check pytest

pytest: $(DEV)
	$(RUN) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

check: $(DEV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The site in build/site. Warnings are errors, links without a target too.
docs: $(DOCS)
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet
	$(RUN) docs/site/check.py build/site
	@echo 'the site: build/site/index.html; with search: $(RUN) -m http.server --directory build/site'

bench: $(DEV)
	$(RUN) -m benchmarks.nets
	$(RUN) benchmarks/convert.py
	$(RUN) benchmarks/feed.py
	$(RUN) -m benchmarks.startup
	$(RUN) benchmarks/loop.py

# Five nets beside timm in under ten minutes.
bench-short: $(DEV)
	$(RUN) -m benchmarks.nets --short

# Needs a GPU, and JAX and torch that use it.
bench-gpu:
	$(RUN) -m benchmarks.gpu

clean:
	rm -rf $(VENV) demo-output build

$(CORE): pyproject.toml constraints.txt
	@echo 'setting up $(VENV): a minute or two'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[train]'
	touch $@

$(DEV): $(CORE)
	@echo 'adding what the tests need: two to five minutes'
	$(INSTALL) -e '.[dev]'
	touch $@

$(DOCS): $(CORE)
	@echo 'adding what the site needs: half a minute'
	$(INSTALL) -e '.[docs]'
	touch $@
