#!/bin/bash
# VNN-COMP: run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS TIMEOUT
# Writes sat, unsat, timeout, unknown or error into RESULTS, and behind sat the counterexample in the form of the query's
# version of VNN-LIB. The tool stops before TIMEOUT, the seconds of wall time that the harness gives this script.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/arguments.sh"

take_arguments run_instance.sh 6 "$@" || exit 1
results=$5
limit=$(LC_ALL=C awk -v t="$6" 'BEGIN { if (t + 0 <= 0) exit 1; print t < 10 ? 0.9 * t : t - 1 }') ||
    refuse "TIMEOUT: found '$6'; accepted: seconds > 0" || exit 1

echo timeout >"$results" || exit 1 # stands if the harness ends the tool
"$environment/bin/certtrain" verify "$vnnlib" --network "$onnx" --results "$results" --timeout "$limit" >/dev/null &
tool=$!
trap 'kill "$tool" 2>/dev/null; wait "$tool"; exit 143' TERM INT
wait "$tool"
code=$?
if [ "$code" -ne 0 ]; then
    echo error >"$results"
    echo "certtrain ended with exit code $code" >&2
fi
head -n 1 "$results"
