"""The command ``mmkd train``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
