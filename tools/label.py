"""The command ``mmkd label``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['label', *sys.argv[1:]]))
