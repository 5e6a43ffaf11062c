"""Measure and draw the loss of a finished run's network: python scripts/diagnose.py RUN_DIR."""

import sys

from certtrain.command_line import main

if __name__ == "__main__":
    sys.exit(main(["diagnose", *sys.argv[1:]]))
