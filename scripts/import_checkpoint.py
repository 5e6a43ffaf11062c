"""Import a network trained elsewhere as a run: python scripts/import_checkpoint.py FILE --architecture cnn7 …"""

import sys

from certtrain.command_line import main

if __name__ == "__main__":
    sys.exit(main(["import-checkpoint", *sys.argv[1:]]))
