"""Attack a finished run's test images, and count: python scripts/evaluate.py RUN_DIR; killed, the same call goes on."""

import sys

from certtrain.command_line import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
