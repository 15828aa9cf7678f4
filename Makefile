# Python and make are all that is needed: `make demo`, `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# PyPI's torch for Linux brings gigabytes of CUDA; https://download.pytorch.org/whl/cpu here takes the build for CPUs
TORCH_INDEX ?=

.PHONY: help demo test test-eval test-lowest lint clean
help:
	@echo "make demo          convert the embedded LLaVA, ask it about a picture, write demo.png"
	@echo "make test          run the tests"
	@echo "make test-eval     install lm-evaluation-harness and lmms-eval, and run their tests"
	@echo "make test-lowest   run the core tests with the lowest versions that requirements.txt allows"
	@echo "make lint          check style"
	@echo "make clean         remove what these made, but for dpvr-tiny"

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, as transformers needs it; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/python scripts/demo.py

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-eval: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-eval.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lm-eval==0.4.13 lmms-eval==0.7.3
	$(VENV)/bin/python -m pytest tests/test_evaluation.py $(PYTEST_ARGS)

test-lowest:
	$(PYTHON) scripts/lowest_versions.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .dpvr-demo-* .pytest_cache .ruff_cache .hypothesis
	rm -f demo.png
	@test ! -e dpvr-tiny || echo "dpvr-tiny stays: it may hold more than the demo wrote. Remove it yourself."
