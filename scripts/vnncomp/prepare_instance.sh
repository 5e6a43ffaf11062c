#!/bin/bash
# VNN-COMP: prepare_instance.sh v1 CATEGORY ONNX VNNLIB
# Looks whether the tool is installed and the files are there, and loads the tool once, so that the disk's cache holds
# it. Looks at no content. Another exit code than 0 skips the instance.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/arguments.sh"

take_arguments prepare_instance.sh 4 "$@" || exit 1
"$environment/bin/python" -c 'import certtrain.verifiers.solving' || exit 1
