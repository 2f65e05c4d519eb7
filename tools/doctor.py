"""The command ``mmkd doctor``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['doctor', *sys.argv[1:]]))
