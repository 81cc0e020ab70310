# One command per check; CI runs the same ones. The first call makes .venv and installs, later calls do not.
#   make demo          train random, greedy and balanced on digits; print the table; figures in demo-output/
#   make test          the fast test suite, doctests included        (ARGS="-k name" to choose)
#   make test-slow     what the fast suite leaves out: more and larger problems, twice the examples; some minutes
#   make check         lint, types, docs, wheel-test, test
#   make flower-demo   one run in the loop, in Flower's simulation, deployed on 127.0.0.1   (ARGS="--data-dir DIR")
#   make test-flower   runs on Flower's real engines, some killed in the middle of a run; some minutes
#   make nvflare-demo  one run in the loop and in NVFlare's simulator, in .venv-nvflare; make test-nvflare tests it
#   make study         optimality against speed, as in docs/study.md    (ARGS="--quick" for a small one)
# PIP_ARGS goes to every pip install. A CPU-only build of torch is a fraction of the default one: to have it, name
# the index that carries it with PIP_ARGS="--extra-index-url ..." or in pip's own configuration.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
PIP_ARGS ?=
NVFLARE ?= nvflare==2.9.0
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
# One process per core is what runs in parallel: threads of the numerical libraries would only get in its way.
export OMP_NUM_THREADS := 1

.PHONY: help demo flower-demo nvflare-demo study test test-slow test-flower test-nvflare lint format types docs wheel-test check clean

help:
	@sed -n '2,9p' Makefile | cut -c3-

.venv/made:
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/run: .venv/made pyproject.toml constraints.txt
	@echo "installing the package with what training and plots need"
	@$(INSTALL) --editable '.[train,plot]'
	@touch $@

.venv/flower: .venv/made pyproject.toml constraints.txt
	@echo "installing the package with what Flower needs"
	@$(INSTALL) --editable '.[train,flower]'
	@touch $@

# Apart from the others: what NVFlare brings along (Flask, Docker, ...) is no concern of the package.
.venv-nvflare/made: pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venv-nvflare
	@echo "installing the package with what training needs, and NVFlare"
	@.venv-nvflare/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		$(PIP_ARGS) --editable '.[train]' $(NVFLARE) pytest hypothesis
	@touch $@

.venv/bench: .venv/made pyproject.toml constraints.txt
	@echo "installing the package with what the study needs"
	@$(INSTALL) --editable '.[plot,bench]'
	@touch $@

.venv/dev: .venv/made pyproject.toml constraints.txt
	@echo "installing the package with what the checks need"
	@$(INSTALL) --editable '.[dev,train,plot,bench,flower]'
	@touch $@ .venv/run .venv/bench .venv/flower

demo: .venv/run
	@$(BIN)/fedmoe-sched demo --output demo-output

flower-demo: .venv/flower
	@$(BIN)/python examples/flower_demo.py $(ARGS)

nvflare-demo: .venv-nvflare/made
	@.venv-nvflare/bin/python examples/nvflare/demo.py $(ARGS)

study: .venv/bench
	@$(BIN)/python -m benchmarks.study $(ARGS)

test: .venv/dev
	@$(BIN)/python -m pytest --quiet -n $(JOBS) --dist worksteal --doctest-modules fedmoe_sched benchmarks tests $(ARGS)

test-slow: .venv/dev
	@$(BIN)/python -m pytest --quiet -n $(JOBS) --dist worksteal --hypothesis-profile=slow \
		-m "slow or hypothesis" tests $(ARGS)

test-flower: .venv/dev
	@$(BIN)/python -m pytest --quiet -m flower tests $(ARGS)

test-nvflare: .venv-nvflare/made
	@.venv-nvflare/bin/python -m pytest --quiet -m nvflare tests/test_nvflare.py $(ARGS)

lint: .venv/dev
	@$(BIN)/ruff format --quiet --check . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/ruff check --quiet .

format: .venv/dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

types: .venv/dev
	@$(BIN)/mypy

docs: .venv/dev
	@$(BIN)/sphinx-build -W --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Whether the built wheel is whole, in an environment and a folder that know nothing of this source tree.
wheel-test: .venv/dev
	@.ci/wheel-test "$(BIN)/python" $(JOBS)

check: lint types docs wheel-test test

clean:
	@rm -rf build dist docs/_build docs/api/generated demo-output study-output *.egg-info .mypy_cache .ruff_cache .pytest_cache
