"""What several test files share: small models, writers of files, and programs that tests start."""

from pathlib import Path

HELPERS = Path(__file__).parent
"""The folder of the programs."""
