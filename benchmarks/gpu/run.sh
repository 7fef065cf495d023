#!/usr/bin/env bash
# Every measurement of speed on a GPU in one go, under ten minutes; a short table last. In an environment with samplerbench:
#
#     OUT=out bash benchmarks/gpu/run.sh                 # writes out/speed.json and out/speed.txt
#     CPU=1 bash benchmarks/gpu/run.sh                   # in small, to try it where there is none
#     bash benchmarks/gpu/run.sh --only bf16 --minutes 4
#
# What it wrote is committed as benchmarks/results/gpu/DATE-speed.json and .txt whenever it is run.
set -euo pipefail
options=(--out "${OUT:-out}")
[ -n "${CPU:-}" ] && options+=(--device cpu --small)
exec "${PYTHON:-python}" "$(dirname "$0")/speed.py" "${options[@]}" "$@"
