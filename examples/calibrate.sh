#!/usr/bin/env bash
# Measure a recipe for a model on your text, look at it, measure what it costs, and use it.
#
#   examples/calibrate.sh [MODEL] [TEXT]
#
# Needs `pip install 'fourier-vllm[eval]'`. Without MODEL: SmolLM2-135M-Instruct, fetched; without TEXT: Python's
# language reference.
set -euo pipefail

model=${1:-$(fourier-vllm fetch)}
text=(${2:+--text "$2"})

# bits for every layer, head and dim: pages 6.3 times smaller than raw K and V
fourier-vllm calibrate "$model" "${text[@]}" --target balanced --output recipe.json

# what the recipe keeps, as a table and as a picture
fourier-vllm inspect recipe.json --plot recipe.svg

# KL to exact attention, beside fp8
fourier-vllm eval "$model" --recipe recipe.json --compare fp8 --tasks nll --documents 2 --context 4096 --out eval

# the recipe in an engine
python "$(dirname "$0")/offline.py" --model "$model" --recipe recipe.json
