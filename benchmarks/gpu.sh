#!/usr/bin/env bash
# Tests the kernels on the GPU of this machine, then measures them: under 9 minutes, from any folder.
#
#   benchmarks/gpu.sh [OUTPUT_FOLDER]               PYTHON=... to take another Python than `python`
#   benchmarks/gpu.sh --rehearse [OUTPUT_FOLDER]    every step at tiny size on a CPU, through Triton's interpreter
#
# Rows go to OUTPUT_FOLDER (benchmarks/results by default, for a rehearsal a new temporary folder): kernels-gpu.jsonl,
# generation-gpu.jsonl. Nothing is measured unless every test of the kernels passes. A benchmark that exceeds its time
# limit is stopped, and its rows so far are kept. If the tests of CUDA graphs pass, too, decoding steps are replayed as
# graphs. Prompts too long for the GPU's memory are cut to what fits. Rehearse before you take a GPU: the commands are
# the same, only their last flags make them small.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python}"
run=("$python") workers=12 tests=() tiny_kernels=() tiny_generation=() results="$here/benchmarks/results"
if [[ "${1:-}" == --rehearse ]]; then
    shift
    results="${1:-$(mktemp -d)}" run=("$python" benchmarks/rehearse.py) workers=0
    tests=(-k "one_query or decoding-head or asked_to")
    tiny=(--heads 1 --kv_heads 1 --head_dim 8 --block_size 8 --num_retrieved_blocks 1 --num_local_blocks 1)
    tiny_kernels=("${tiny[@]}" --dtype float16 --lengths 9 --tokens 18 --reading_lengths 33 --rate_size 64
        --repetitions 1 --warmup 0)
    tiny_generation=("${tiny[@]}" --dtype float32 --hidden_size 8 --layers 1 --train_context_length 32
        --vocab_size 33 --intermediate_size 16 --lengths 30 --decode_tokens 16 --warmup_tokens 2)
fi
mkdir -p "${1:-$results}"
output="$(cd "${1:-$results}" && pwd)"
cd "$here"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ "${#run[@]}" == 1 ]]; then
    "$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("benchmarks/gpu.sh: PyTorch sees no GPU")'
fi

# tests/test_triton_compilation.py is left out: it needs no GPU
test=("$python" -m pytest --quiet -n "$workers" "${tests[@]}")
timeout 140 "${test[@]}" tests/test_triton_training.py tests/test_triton_inference.py

failed=0 graphs=True
timeout 60 "${test[@]}" tests/test_decoding_graphs.py || { failed=1 graphs=False; }

measure() { # measure SECONDS COMMAND...: a benchmark that fails or exceeds its limit does not stop the next one
    timeout "$@" || { failed=1; echo "benchmarks/gpu.sh: failed or out of time: ${*:2}" >&2; }
}
generation() { # generation SECONDS FLAGS...
    measure "$1" "${run[@]}" benchmarks/generation.py --device cuda --dtype bfloat16 --repetitions 1 --fit_memory True \
        --hidden_size 4096 --layers 32 --heads 32 --head_dim 128 --block_size 64 --train_context_length 4096 \
        --num_retrieved_blocks 8 --num_local_blocks 8 --cuda_graphs "$graphs" \
        --output "$output/generation-gpu.jsonl" "${@:2}" "${tiny_generation[@]}"
}

measure 110 "${run[@]}" benchmarks/kernels.py --output "$output/kernels-gpu.jsonl" "${tiny_kernels[@]}"
# LLaMA-7B's shape, beside the dense model; then LLaMA 3 8B's with half a million tokens, too many for the dense model
generation 160 --vocab_size 32001 --intermediate_size 11008 --lengths 32768 131072
generation 90 --vocab_size 128257 --intermediate_size 14336 --kv_heads 8 --lengths 524288 --granularity head \
    --dense False --warmup_tokens 32768
exit "$failed"
