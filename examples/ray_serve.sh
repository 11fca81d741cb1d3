#!/usr/bin/env bash
# Two replicas behind one OpenAI-compatible address on Ray Serve, and a question to them.
#
#   examples/ray_serve.sh [MODEL]
#
# Needs `pip install 'fourier-vllm[ray]'`. Without MODEL: SmolLM2-135M-Instruct, fetched; it runs on a CPU too.
set -euo pipefail

model=${1:-$(fourier-vllm fetch)}
url=http://127.0.0.1:8000/v1
options=(--served-model-name example --max-model-len 4096 --kv-cache-memory-bytes 256M)
if ! nvidia-smi >/dev/null 2>&1; then
    options+=(--enforce-eager)                # compiling takes minutes on a CPU
    export VLLM_CPU_OMP_THREADS_BIND=nobind   # the replicas share the cores
fi

fourier-vllm deploy "$model" --replicas 2 --port 8000 -- "${options[@]}" &
server=$!
trap 'kill $server 2>/dev/null; wait $server || true' EXIT

until curl --silent --fail --noproxy '*' --output /dev/null "$url/models"; do
    kill -0 $server # ends this script where the deployment has ended
    sleep 2
done
curl --silent --noproxy '*' "$url/chat/completions" -H 'Content-Type: application/json' -d '{
    "model": "example",
    "messages": [{"role": "user", "content": "Name three colours of the rainbow."}],
    "max_tokens": 48
}'
echo
