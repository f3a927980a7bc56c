# Every target makes its own virtual environment, .venv, with the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test bench lint package torch constraints clean

demo: .venv/installed  ## trains on a data set that is on board, prints the accuracy and writes a report
	$(BIN)/python main.py --config=configs/digits.py --workdir=runs/digits
	$(BIN)/python main.py --mode=report --workdir=runs/digits

bench: .venv/installed-test  ## measures again every figure that this machine can: an hour or more
	$(BIN)/python -m benchmarks --all

test: .venv/installed-test  ## the whole test suite
	$(BIN)/python -m pytest -n logical --dist worksteal

lint: .venv/installed-lint  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: .venv/installed-package  ## sdist and wheel, and the wheel in an environment of its own
	.ci/wheel

torch: .venv/installed-torch .venv/installed-pytorchcv  ## installs PyTorch, so that `make test` compares with it

constraints:  ## newest versions into constraints.txt (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate \
	    --extra prepare --extra test --extra lint --extra package setup.py --output-file constraints.txt
	printf '%s\n' torch==2.13.0 pytorchcv==0.0.74 >> constraints.txt

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

.venv/installed-%: .venv/installed
	$(INSTALL) --editable ".[$*]"
	touch $@

.venv/installed-pytorchcv: .venv/installed  # without torchvision, which its residual attention nets do not need
	$(INSTALL) --no-deps pytorchcv
	touch $@
