#!/usr/bin/env bash
# The tests and the benchmarks that need a GPU, in one call of under ten minutes on a fresh machine with one:
#
#     OUT=results bash benchmarks/gpu.sh
#
# Needs Python 3.11 or newer (PYTHON names another one). Uses .venv where there is one; otherwise makes .venv-gpu, which
# sees the packages of the Python it is made from. Without a way to fetch packages it goes on with those that are there,
# and the benchmarks leave out the peers that are not. OUT (default benchmarks/results) receives the CSVs, named after
# the device, and the tests' log.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"

if [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    [ -x .venv-gpu/bin/python ] || "${PYTHON:-python3}" -m venv --system-site-packages .venv-gpu
    python=.venv-gpu/bin/python
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; PYTHON=... bash benchmarks/gpu.sh")'
timeout 120 "$python" -m pip install --quiet --retries 1 --timeout 10 --config-settings editable_mode=compat -e ".[dev,bench]" ||
    echo "packages could not be installed; going on with those that are there"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 VLM_DISTILL_GPU_TESTS=1
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.__version__, torch.cuda.get_device_name())'

# The benchmarks also run where a test fails; the script's own status is the tests'.
status=0
unfinished="the benchmark did not finish; its table has what it measured until then"
timeout 150 "$python" -m pytest -m gpu tests/losses tests/vision tests/planning -q 2>&1 | tee "$OUT/gpu_tests.log" || status=$?
name=$("$python" -c 'import torch; print("".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name().lower()))')
timeout 110 "$python" benchmarks/losses.py --device cuda --threads 4 --output "$OUT/losses_$name.csv" || echo "$unfinished"
timeout 100 "$python" benchmarks/vision_speed.py --device cuda --threads 4 --output "$OUT/vision_speed_$name.csv" || echo "$unfinished"
timeout 110 "$python" benchmarks/training.py --device cuda --threads 4 --output "$OUT/training_$name.csv" || echo "$unfinished"
exit "$status"
