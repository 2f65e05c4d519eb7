"""The command ``mmkd distill``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['distill', *sys.argv[1:]]))
