#!/usr/bin/env bash
# Tests the kernels on the GPU of this machine, then measures them: under 9 minutes, from any folder.
#
#   benchmarks/gpu.sh [OUTPUT_FOLDER]         PYTHON=... to take another Python than `python`
#
# Rows go to OUTPUT_FOLDER (benchmarks/results by default): kernels-gpu.jsonl, generation-gpu.jsonl. Nothing is measured
# unless every test of the kernels passes. A benchmark that exceeds its time limit is stopped, and its rows so far are
# kept. If the tests of CUDA graphs pass, too, decoding steps are replayed as graphs.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mkdir -p "${1:-$here/benchmarks/results}"
output="$(cd "${1:-$here/benchmarks/results}" && pwd)"
python="${PYTHON:-python}"
cd "$here"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

"$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("benchmarks/gpu.sh: PyTorch sees no GPU")'

# tests/test_triton_compilation.py is left out: it needs no GPU
timeout 140 "$python" -m pytest --quiet tests/test_triton_training.py tests/test_triton_inference.py

failed=0 graphs=True
timeout 40 "$python" -m pytest --quiet tests/test_decoding_graphs.py || { failed=1 graphs=False; }

measure() { # measure SECONDS COMMAND...: a benchmark that fails or exceeds its limit does not stop the next one
    timeout "$@" || { failed=1; echo "benchmarks/gpu.sh: failed or out of time: ${*:2}" >&2; }
}
generation() { # generation SECONDS FLAGS...
    measure "$1" "$python" benchmarks/generation.py --device cuda --dtype bfloat16 --repetitions 1 --hidden_size 4096 \
        --layers 32 --heads 32 --head_dim 128 --block_size 64 --train_context_length 4096 --num_retrieved_blocks 8 \
        --num_local_blocks 8 --cuda_graphs "$graphs" --output "$output/generation-gpu.jsonl" "${@:2}"
}

measure 110 "$python" benchmarks/kernels.py --output "$output/kernels-gpu.jsonl"
# LLaMA-7B's shape, beside the dense model; then LLaMA 3 8B's with half a million tokens, too many for the dense model
generation 160 --vocab_size 32001 --intermediate_size 11008 --lengths 32768 131072
generation 90 --vocab_size 128257 --intermediate_size 14336 --kv_heads 8 --lengths 524288 --granularity head \
    --dense False --warmup_tokens 32768
exit "$failed"
