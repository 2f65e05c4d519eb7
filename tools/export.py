"""The command ``mmkd export``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['export', *sys.argv[1:]]))
