# Everything runs in .venv, which the first target that needs it makes. TORCH may name another build or version.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# Where there is no NVIDIA GPU, nothing could run the CUDA code; tests/ops/test_nvcc.py compiles it all the same.
export SSVDO_CUDA_ARCHS ?= $(if $(shell command -v nvidia-smi),,none)

.PHONY: demo test bench lint docs gpu gpu-layers gpu-models gpu-soak clean

$(STAMP): pyproject.toml setup.py $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "setuptools>=77" "pybind11>=2.13"
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[triton,peft,quant,asr,bench,docs,dev]"
	$(BIN)/pip install --quiet --no-deps "espnet==202511" loralib torch_complex  # tests use a few of its files alone
	touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.asr.demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 SSVDO_AUTOTUNE=0 timeout 100 compute-sanitizer --tool $$tool \
  --error-exitcode 9 --target-processes all $(PYTHON) -m pytest -q -m gpu tests/gpu -k every

# Runs with the machine's own Python and torch: a GPU box has its build installed. Results go to $OUT.
gpu gpu-layers gpu-models gpu-soak: export PYTHONPATH := .
gpu:
	SSVDO_BUILD=1 SSVDO_CUDA_ARCHS=$${SSVDO_CUDA_ARCHS:-90a} $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m ssvdo_kernels.info
	$(PYTHON) -m pytest -q -m gpu tests/gpu
	for tool in memcheck racecheck; do $(SANITIZE) || exit 1; done
	$(PYTHON) -m benchmarks.bench_preparation --device cuda --out $${OUT:-benchmarks/results}
	$(PYTHON) -m benchmarks.bench_kernels --out $${OUT:-benchmarks/results}
	$(PYTHON) -m benchmarks --quick --device cuda --dtype bfloat16 --out $${OUT:-benchmarks/results}

# Each under 9 minutes, after `make gpu` on the same machine (it builds): what has not begun by then is left out.
gpu-layers:
	$(PYTHON) -m benchmarks --device cuda --dtype bfloat16 --minutes 8 --out $${OUT:-benchmarks/results}

gpu-models:
	$(PYTHON) -m benchmarks.bench_model owsm-0.1b owsm-1b whisper-large owsm-2b --minutes 6 --out $${OUT:-benchmarks/results}

# The other two sanitizers, and training for MINUTES with flat memory.
gpu-soak:
	for tool in initcheck synccheck; do $(SANITIZE) || exit 1; done
	$(PYTHON) -m benchmarks.soak --minutes $${MINUTES:-10} --out $${OUT:-benchmarks/results}

clean:
	rm -rf $(VENV) build *.egg-info ssvdo_kernels/*.so
