"""The command ``mmkd convert``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['convert', *sys.argv[1:]]))
