"""``python -m certtrain.checker MODEL PROOF``: prints ``proved``, or ``rejected`` (exit 1)."""

import argparse
import sys
from pathlib import Path

from .arithmetic import Rejected
from .check import check


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="checker", description="Check a proof about a network.")
    parser.add_argument("model", type=Path, help="the network, an ONNX file")
    parser.add_argument("proof", type=Path, help="the proof, docs/proofs.md")
    parser.add_argument("--property", type=Path, help="the property (VNN-LIB 1.0) that it is about")
    parser.add_argument("--float32", action="store_true", help="of every float32 evaluation too")
    parser.add_argument("--exact", action="store_true", help="in fractions, for small networks")
    options = parser.parse_args(arguments)
    if options.float32 and options.exact:
        parser.error("--float32 and --exact exclude each other")
    for path in filter(None, (options.model, options.proof, options.property)):
        if not path.is_file():
            parser.error(f"{path}: found no file")
    try:
        margin = check(
            options.model, options.proof, options.property, options.float32, options.exact
        )
    except Rejected as why:
        print(f"rejected: {why}")
        return 1
    except OSError as error:
        parser.error(str(error))
    print(f"proved with the margin {float(margin):.6g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
