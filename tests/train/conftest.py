"""Makes `stand_in` importable, which is a module of these tests and a program that they start."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
