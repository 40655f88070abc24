PYTHON ?= python3
BIN := .venv/bin
# Half a minute at 16 frames a second; DEMO="--sweep per-step --frames 81" makes five seconds as a whole.
DEMO ?= --sweep per-chunk --frames 481
JOBS ?= 2
# Against torch, diffusers, transformers and the equation.
PARITY ?= tests/attention tests/models tests/weights tests/text tests/test_pipeline.py

# A dead worker says which test it was, and ends the run.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

DOCS = $(BIN)/python -m sphinx -q -W -E -b html docs out/docs

# One tier; types and documents beside it, so that no core waits for them.
TESTS_BESIDE = $(BIN)/mypy & types=$$!; $(DOCS) & docs=$$!; $(PYTEST) --tier $(1); tests=$$?; wait $$types && wait $$docs && exit $$tests

.PHONY: demo live check test test-all test-rest durations versions versions-lowest versions-newest tests-of-versions platforms lint style docs install clean

demo: .venv/installed  ## a video from a sentence, streamed by the bundled model
	$(BIN)/rehyat generate "a lemon moving down slowly and a mushroom moving up and left quickly on a blue background" $(DEMO) --out out/demo.mp4 --overwrite

live: .venv/installed  ## a page on which a sentence becomes a video without an end
	$(BIN)/python -m pip install --quiet -e '.[serve]'
	$(BIN)/rehyat serve --browser

check: .venv/installed-test style  ## ninety seconds: lint, types, and the tests that compile nothing large
	$(call TESTS_BESIDE,check)

test: .venv/installed-test style  ## six minutes on two cores: lint, types, and each claim once
	$(call TESTS_BESIDE,test)

test-all: test test-rest  ## 25 minutes more: many sizes, kills, several processes, compilation for TPUs

test-rest: .venv/installed-test  ## what test-all adds to test
	$(PYTEST) --tier rest

durations: .venv/installed-test  ## measure anew what tests cost: which of them `check` runs, and which files come first
	$(PYTEST) --tier all --record new
	$(PYTEST) --tier check --record larger

platforms: .venv/bin/python  ## that every dependency has a wheel for each platform and Python; asks the package index
	$(BIN)/python -m pip install --quiet packaging
	$(BIN)/python .ci/platforms.py

versions: versions-lowest versions-newest  ## check's tests and parity, with the lowest and the newest admitted versions

# Environments of their own: the lowest of PYTHON, the newest of a Python 3.12 that runs here, for which JAX is newer.
NEWEST_PYTHON ?= $(shell for each in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3 $(PYTHON); do \
	$$each -c "" 2>/dev/null && echo $$each && break; done)
versions-lowest: OF_PYTHON = $(PYTHON)
versions-newest: OF_PYTHON = $(NEWEST_PYTHON)
versions-lowest: CONSTRAINED = -c tests/versions/lowest.txt
versions-newest: CONSTRAINED = --upgrade --upgrade-strategy eager
versions-lowest versions-newest:
	$(OF_PYTHON) -m venv --clear .venv-$@
	.venv-$@/bin/python -m pip install --quiet torch==2.13.0
	.venv-$@/bin/python -m pip install --quiet $(CONSTRAINED) -e '.[test]'
	$(MAKE) BIN=.venv-$@/bin tests-of-versions

tests-of-versions:
	$(PYTEST) --tier check
	$(PYTEST) --tier test $(PARITY)

lint: style docs

style: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/installed-test  ## the documents as pages, in out/docs
	$(DOCS)

install: .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# torch by name and version first: a plain `torch` pulls gigabytes of CUDA.
.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ .venv/installed

clean:
	rm -rf .venv .venv-versions-* .cache out build *.egg-info
