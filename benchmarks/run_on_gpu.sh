#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one, with torch installed: builds, tests the ops on the device,
# measures copy bandwidth and matrix rate, runs the benchmarks. One JSON: benchmarks/results/<device>.json.
# A part that fails is named in the JSON and at the end, and the parts after it still run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no CUDA device" >&2
  exit 2
fi

since=$(date +%s)
parts=()
failed=0
part() {
  local name=$1 start=$SECONDS outcome=ok
  shift
  echo "== $name"
  "$@" || outcome="failed with status $?"
  [ "$outcome" = ok ] || failed=1
  parts+=("$name=$outcome, $((SECONDS - start)) s")
}

part build env DEEPLAB_FAST_NATIVE=1 DEEPLAB_FAST_CUDA=1 \
  "$python" -m pip install --no-build-isolation --no-deps -e .
part info "$python" -m deeplab_fast.info
part tests "$python" -m pytest tests/ops
part benchmarks "$python" -m pytest benchmarks/ --benchmark-only --device cuda --save-results \
  --benchmark-columns=median,iqr,rounds

"$python" -m benchmarks.ratios "$since" "${parts[@]}"
printf '%s\n' "${parts[@]}"
exit "$failed"
