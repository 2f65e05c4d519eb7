"""The command ``mmkd prepare``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['prepare', *sys.argv[1:]]))
