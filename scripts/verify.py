"""Certify a finished run's test images: python scripts/verify.py RUN_DIR; the same call resumes a killed one."""

import sys

from certtrain.command_line import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
