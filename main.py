"""Trains an image classifier, or resumes it: the same as `python -m imgcls train`.

python main.py --config=configs/cifar10.py --workdir=runs/cifar10 [--config.key=value ...]
"""

import sys

from imgcls.__main__ import Train
from imgcls.run import cli

if __name__ == "__main__":
    cli.run(lambda: Train, sys.argv)
