"""Train, evaluate and tabulate the recipes of a study with several seeds; the same call resumes a stopped one."""

import sys

from certtrain.command_line import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
