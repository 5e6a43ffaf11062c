"""Check the proofs of a run's certificates: python scripts/check.py RUN_DIR; the same call resumes a killed one."""

import sys

from certtrain.command_line import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
