"""A program that several processes run: torchrun run_distillation.py CONFIG [--key value ...]"""

import sys

from nirvana.train.distill import distill

if __name__ == "__main__":
    distill(sys.argv[1], sys.argv[2:])
