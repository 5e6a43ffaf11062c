"""Train with any loss of the library (--loss.type, or a recipe given with --config), then certify."""

import sys

from certtrain.command_line import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
