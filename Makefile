# Every target makes its own .venv and installs what it needs. CPU build of torch where there is no NVIDIA driver.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Bytecode is written, whatever the shell says: every process of Ray starts in 1 s instead of 5.
unexport PYTHONDONTWRITEBYTECODE
# uv reads its own variable for extra wheel directories: pass on what pip is configured with.
export UV_FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS))
TORCH_BACKEND := $(shell command -v nvidia-smi >/dev/null 2>&1 || test -n "$(UV_FIND_LINKS)" || echo --torch-backend=cpu)
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH_BACKEND)

TRITON := $(VENV)/triton

.PHONY: demo test test-kernels test-gpu test-helm helm-tools node-tools crds test-slow fuzz soak lint bench bench-serving clean

demo: $(VENV)/.runtime
	$(BIN)/altiplano run pipelines/demo/pipeline.yaml

test: $(VENV)/.dev helm-tools node-tools
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --durations=25

# Triton's kernels by its interpreter; beside the environment, not in it, because the rest must run without it.
test-kernels: $(VENV)/.dev $(TRITON)
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest tests/kernels

# The CUDA backend, on an NVIDIA GPU of compute capability 9.0 or newer.
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu tests/gpu

$(TRITON): $(VENV)/.dev
	$(INSTALL) --no-deps --target $@ triton==3.7.1
	touch $@

# The chart alone; `make test` runs these tests too.
test-helm: $(VENV)/.dev helm-tools
	$(BIN)/python -m pytest tests/helm

helm-tools: $(VENV)/.dev
	bash tests/helm/fetch_tools.sh $(VENV)/tools

# OpenAI's client for Node, whose contract is a test.
node-tools: $(VENV)/.dev
	bash tests/serve/node/install.sh $(VENV)/tools/node

# Upstream's CRD files, where a network is and shared/crds is not.
crds: $(VENV)/.dev
	$(BIN)/python tests/helm/fetch_crds.py $(VENV)/tools/crds

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# Property tests with new examples; what they find becomes an example of its own.
fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest --hypothesis-profile=default -m hypothesis

# Twenty minutes of mixed traffic; memory, file descriptors and KV pages must stay flat.
soak: $(VENV)/.dev
	$(BIN)/python -m tests.chaos.soak

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/control_plane.py

# What HTTP and Ray Serve cost; add WRITE=--write to keep the numbers.
bench-serving: $(VENV)/.dev
	$(BIN)/python benchmarks/serving/overhead.py $(WRITE)

clean:
	if [ -x $(BIN)/altiplano ]; then $(BIN)/altiplano down; fi
	rm -rf $(VENV) .altiplano .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(VENV)/.runtime: $(BIN)/uv pyproject.toml
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(BIN)/uv pyproject.toml
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/.runtime
