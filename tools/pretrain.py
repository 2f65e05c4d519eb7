"""The command ``mmkd pretrain``, from a checkout."""

import sys

from mmkd.cli import main

if __name__ == '__main__':
    sys.exit(main(['pretrain', *sys.argv[1:]]))
