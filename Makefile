# Every chore of the project. Needs Python >= 3.10, pip and make; sets up all else in .hatch/ and .venv/.
PYTHON ?= python3
HATCH := .hatch/bin/hatch
RUN := $(HATCH) run

.PHONY: help demo test test-slow lint types format bench clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(HATCH) ## train on small digits, sample and score: about 4 minutes on 2 cores; results in runs/demo
	$(RUN) farmer demo --output runs/demo

test: $(HATCH) ## run all tests but the slow ones
	$(RUN) pytest

test-slow: $(HATCH) ## run the slow tests: more layouts of processes, compilation
	$(RUN) pytest -m slow

lint: $(HATCH) ## check style and format
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(HATCH) ## check types
	$(RUN) mypy

format: $(HATCH) ## put all files into format
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .

bench: $(HATCH) ## run the benchmarks
	@for name in shared_mixture cached_decoding training_step processes inversion guided_decoding guidance_accuracy; do echo "== $$name"; $(RUN) python benchmarks/$$name.py || exit 1; done

clean: ## remove the environments
	rm -rf .hatch .venv

# some Pythons come without ensurepip, which venv needs; virtualenv brings its own
$(HATCH):
	@$(PYTHON) -m venv .hatch >/dev/null 2>&1 || { rm -rf .hatch && \
	  $(PYTHON) -m pip install --quiet --target .hatch/bootstrap virtualenv && \
	  PYTHONPATH=.hatch/bootstrap $(PYTHON) -m virtualenv --quiet .hatch; }
	.hatch/bin/python -m pip install --quiet --disable-pip-version-check 'hatch>=1.18'
