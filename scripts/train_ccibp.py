"""The main job: train with CC-IBP (or any recipe given with --config), then certify."""

import sys

from certtrain.command_line import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
