"""A program that several processes run: torchrun train_codec.py CONFIG [--key value ...]"""

import sys

from nirvana.mri.train import train

if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2:])
