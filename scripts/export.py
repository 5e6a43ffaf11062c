"""Write a finished run's files for other verifiers, ONNX and VNN-LIB: python scripts/export.py RUN_DIR."""

import sys

from certtrain.command_line import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
