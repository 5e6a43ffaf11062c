#!/bin/bash
# Sourced by prepare_instance.sh and run_instance.sh, with $here as their folder.

environment=${CERTTRAIN_ENVIRONMENT:-$here/../../.venv-vnncomp}

refuse() {
    echo "error: $1" >&2
    return 1
}

there() {
    [ -e "$1" ] || [ -e "$1.gz" ]
}

# take_arguments SCRIPT COUNT "$@": sets $onnx and $vnnlib. A list of networks, [('f','onnx/a.onnx'),…], whose first file
# is not there is taken from the benchmark's folder, the one above the query's.
take_arguments() {
    local script=$1 count=$2 first
    shift 2
    if [ $# -ne "$count" ] || [ "$1" != v1 ]; then
        refuse "$script: found $# words, the first '${1:-}'; accepted: $count, v1 CATEGORY ONNX VNNLIB$(
            [ "$count" = 4 ] || echo ' RESULTS TIMEOUT')"
        return 1
    fi
    onnx=$3 vnnlib=$4
    [ -x "$environment/bin/certtrain" ] ||
        refuse "$environment: found no certtrain; accepted: what install_tool.sh v1 installs" || return 1
    there "$vnnlib" || refuse "$vnnlib: not found; accepted: a VNN-LIB file" || return 1
    case $onnx in
    *"[("*)
        first=${onnx#*,}
        first=${first#*[\'\"]}
        first=${first%%[\'\"]*}
        case $onnx in
        "["*) there "$first" || onnx="$(dirname "$(dirname "$vnnlib")")/$onnx" ;;
        esac
        ;;
    *)
        there "$onnx" || refuse "$onnx: not found; accepted: an ONNX file, or a list of named ones" || return 1
        case $onnx in
        /*) ;;
        *) onnx=./$onnx ;; # f=g.onnx would be a network's name and its file
        esac
        ;;
    esac
}
