"""A program that several processes run: torchrun run_training.py CONFIG [--key value ...]"""

import sys

from nirvana.mri.train.task import train

if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2:])
