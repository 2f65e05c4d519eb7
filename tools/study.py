"""The command ``mmkd study``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['study', *sys.argv[1:]]))
