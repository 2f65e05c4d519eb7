"""The command ``mmkd eval``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['eval', *sys.argv[1:]]))
