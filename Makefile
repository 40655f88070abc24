PYTHON ?= python3
BIN := .venv/bin
# Half a minute at 16 frames a second; DEMO="--sweep per-step --frames 81" makes five seconds as a whole.
DEMO ?= --sweep per-chunk --frames 481

.PHONY: demo test docs install clean

demo: .venv/installed  ## a video from a sentence, streamed by the bundled model
	$(BIN)/rehyat generate "a lemon moving down slowly and a mushroom moving up and left quickly on a blue background" $(DEMO) --out out/demo.mp4

test: .venv/installed-test  ## lint, types, then every test that two cores can run
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

docs: .venv/installed-test  ## the documents as pages, in out/docs
	$(BIN)/python -m sphinx -q -W -E -b html docs out/docs

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
	rm -rf .venv out build *.egg-info
