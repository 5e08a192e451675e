# Every target creates the environment on first use and then calls a tool.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Turn telemetry off. DVC's settings are in .dvc/config.
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true

# Each core runs one test file at a time; `make test WORKERS=` runs the files one after the other.
WORKERS := --numprocesses logical --maxprocesses 8 --dist loadfile
STOPPED := 'stopped: see the error above the message of DVC; fix it and run make repro again, which continues with this stage'

.PHONY: repro compare test test-slow test-long test-browser test-faults audit bench ui docs lint lock clean

repro: $(INSTALLED) ## run the pipeline: whatever changed since the last time
	gptj8 check
	@dvc repro || { echo $(STOPPED) >&2; exit 2; }
	gptj8 summary

compare: $(INSTALLED) ## LayerNorms only, LoRA on attention, LoRA on all linears: one table
	gptj8 compare

test: $(INSTALLED) ## the fast tests
	python -m pytest $(WORKERS)

test-slow: $(INSTALLED) ## real servers, processes and pipelines
	python -m pytest -m slow $(WORKERS)

test-long: $(INSTALLED) ## real experiments through DVC, estimated against measured memory: half an hour
	python -m pytest -m long

test-browser: $(INSTALLED) ## look at the runs in a real browser: needs Chromium
	python -m pytest -m browser

test-faults: $(INSTALLED) ## kills, full disks, damage, an hour of work: five hours, and a table
	python -m pytest -m faults

audit: ## every pinned package against known advisories: needs the network; audit.json has all of it
	rm -rf .venv-audit audit.json
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	-.venv-audit/bin/pip-audit --no-deps --disable-pip --progress-spinner off --format json --output audit.json -r requirements.txt
	rm -rf .venv-audit
	$(PYTHON) .ci/audit.py requirements.txt audit.json $(AUDIT)

bench: $(INSTALLED) ## error, perplexity and speed of the 8-bit weights, also of other systems, after `make repro`: two hours
	python -m benchmarks.codec data/models/tiny-gptj/model
	dvc repro data/models/smollm2-135m/dvc.yaml
	python -m benchmarks.perplexity --dither
	python -m benchmarks.restoring
	python -m benchmarks.compare

ui: $(INSTALLED) ## browse the runs at http://127.0.0.1:5000
	gptj8 ui

docs: $(INSTALLED) ## generate docs/params.md and params.schema.json from the typed params
	python -m gptj8.params.documentation

lint: $(INSTALLED) ## ruff and mypy, as continuous integration runs them
	ruff check .
	ruff format --check .
	mypy

lock: ## pin the newest versions of everything in requirements.txt
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet '.[dev]'
	sed -n '/^#/p' requirements.txt > requirements.new
	.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude gptj8 | sed -e 's/+cpu$$//' -e "s/^triton==.*/& ; sys_platform == 'linux' and platform_machine == 'x86_64'/" >> requirements.new
	mv requirements.new requirements.txt
	rm -rf .venv-lock

clean: ## remove the environments; data, models and runs stay
	rm -rf $(VENV) .gptj8/opponents

$(INSTALLED): requirements.txt pyproject.toml $(wildcard gptj8/kernels/c/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python %d.%d; gptj8 needs 3.11 or newer (make PYTHON=python3.11 ...)" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
