"""The command ``mmkd test``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
