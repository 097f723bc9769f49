"""Trains an image classifier, or resumes it, and says how good it is on the test split.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10 [--config.key=value ...]

The same as python -m imgcls train: see imgcls/train.py.
"""

import sys

from imgcls import train
from imgcls.run import cli

if __name__ == "__main__":
    cli.run(lambda: train, sys.argv)
