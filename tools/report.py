"""The command ``mmkd report``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['report', *sys.argv[1:]]))
