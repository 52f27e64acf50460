# Every target takes
#   PYTHON=  the interpreter (3.11 or newer)
#   VENV=    the environment to make or to use; empty: PYTHON as it is, and nothing is installed
#   ARGS=    more arguments for the command behind the target
#   PORT=    where `make site` serves
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PORT ?= 8000

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
INSTALLED :=
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif
MOEBIUS := $(PY) -m optimized.cli

.DEFAULT_GOAL := help
.PHONY: help install tour test model lint types parity bench readme kernels kernel-faults second-triton gpu-check ladder expert-parallel lab notebooks \
	status site site-build clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1\t/p' $(MAKEFILE_LIST) | expand -t 17

install: $(INSTALLED)  ## make the environment, with the versions of constraints.txt
	@echo "$(if $(INSTALLED),ready: $(PY),VENV is empty: using $(PY) as it is)"

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PYTHON=$(PYTHON) is " + sys.version.split()[0] + "; Moebius needs 3.11 or newer")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt hatchling
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

tour: $(INSTALLED)  ## train a small model, look inside it, compare the tracks
	$(MOEBIUS) tour $(ARGS)

test: $(INSTALLED)  ## the fast tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow" -rs --durations=15 $(ARGS)

model: $(INSTALLED)  ## train the committed model again
	$(MOEBIUS) model $(ARGS)

lint: $(INSTALLED)  ## style, formatting and spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib README.md Makefile .ci docs reference optimized notebooks tests

types: $(INSTALLED)  ## type check of both tracks
	$(PY) -m pyright --pythonpath $(PY) $(ARGS)

parity: $(INSTALLED)  ## every track against the reference, Triton in its interpreter
	TRITON_INTERPRET=1 $(MOEBIUS) parity --json docs/results/parity.json $(ARGS); code=$$?; $(PY) docs/tools/readme.py && exit $$code

bench: $(INSTALLED)  ## time the fast path against the limit and every peer (needs a quiet machine)
	$(MOEBIUS) bench --json docs/results/bench-cpu.json $(ARGS); code=$$?; $(PY) docs/tools/readme.py && exit $$code

readme: $(INSTALLED)  ## write the README's table from the committed benchmark
	$(PY) docs/tools/readme.py

kernels: $(INSTALLED)  ## compile every kernel without a GPU and write the table
	$(MOEBIUS) kernels --rejected --json docs/results/kernels-3.7.1.json $(ARGS)

kernel-faults: $(INSTALLED)  ## plant every fault in the kernels again and write what catches it
	OMP_NUM_THREADS=1 $(PY) tests/faults/report.py

second-triton:  ## the kernels on Triton 3.9 (a second engine, its interpreter) and compiled by 3.9 and 3.6 (ARGS=tables: write what these record)
	PYTHON=$(PYTHON) .ci/second-triton $(ARGS)

gpu-check:  ## everything that only a GPU can tell, with the Python that is there
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m optimized.gpu_check $(ARGS)

ladder: $(INSTALLED)  ## count what each rung of the ladder saves
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m optimized.ladder.count

expert-parallel: $(INSTALLED)  ## step times, traffic and faults of expert parallelism
	$(PY) -m optimized.expert_parallel.measure --json docs/results/expert-parallel.json
	$(PY) -m optimized.expert_parallel.faults --json docs/results/expert-parallel-faults.json

lab: $(INSTALLED)  ## the training runs of the site: moebius lab NAME --json FILE writes one anew
	$(MOEBIUS) lab all $(ARGS)

notebooks: $(INSTALLED)  ## execute the notebooks and write them with their outputs
	$(PY) notebooks/build.py $(ARGS)

status: $(INSTALLED)  ## write the generated tables again
	$(MOEBIUS) status $(ARGS)

site-build: $(INSTALLED)  ## build the documentation into site/ (needs npm)
	$(PY) docs/tools/build.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	$(PY) docs/tools/finish.py site

site: export SITE_URL = http://127.0.0.1:$(PORT)/
site: site-build  ## build it and serve it (PORT=8000)
	@echo "serving $(SITE_URL)"
	$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory site

clean:  ## remove caches and builds; environments and committed files stay
	rm -rf build dist site .hypothesis .pytest_cache .ruff_cache
	find reference optimized tests docs notebooks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
