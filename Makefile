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
	$(BIN)/mkdocs build --strict --site-dir build/site

# With the machine's own Python and torch, in calls of under nine minutes: the same target again goes on where it was cut.
# Everything is in build/gpu-run; where OUT is set, in one archive there as well.
gpu gpu-layers gpu-models gpu-soak: export PYTHONPATH := .
gpu gpu-layers gpu-models gpu-soak:
	$(PYTHON) -m benchmarks.gpu_run $@ --minutes $${MINUTES:-8.5} $(if $(OUT),--archive $(OUT)/gpu-run.tar.gz) $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info ssvdo_kernels/*.so ssvdo_kernels/_build.json
