#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one, with torch, nvcc and this project's build requirements:
#   benchmarks/run_on_gpu.sh [PART...]   no PART: all of them, in the order in which --help lists them
# One JSON, benchmarks/results/<device>.json, or in the folder DEEPLAB_FAST_RESULTS. Each part adds what it measured and
# what became of it, so that one alone can be repeated. One that fails or outlasts its limit is named there and at the
# end, and those after it still run; the exit status is 1 then.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_parts "$@"
