PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SANITIZER ?= compute-sanitizer
PROMPT ?= def read_lines(path):

.PHONY: run test test-gpu sanitize lint types install clean

run: $(BIN)/nf ## stream text from the bundled model
	$(BIN)/nf generate -p "$(PROMPT)" --max-tokens 160 --seed 0

test: $(VENV)/.dev lint types ## lint, types, tests
	$(BIN)/pytest

test-gpu: $(VENV)/.gpu ## kernels against references; needs a GPU
	$(BIN)/pytest tests/gpu

# Each tensor in an allocation of its own, with room behind it that nobody may touch. Calls that the driver refuses are
# no news: the bindings ask it for functions of later versions.
sanitize: $(VENV)/.gpu ## some of the GPU tests under compute-sanitizer, which the CUDA toolkit brings
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --report-api-errors no --padding 256 --error-exitcode 1 \
		$(BIN)/python -m pytest -m sanitize tests/gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

install: $(BIN)/nf

$(BIN)/nf: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/nf
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,compile]'
	@touch $@

# PyTorch and transformers are references of the GPU tests and of nothing else.
$(VENV)/.gpu: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[cuda]' torch transformers
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
