"""The rows of the report studies, one for each slice and way of reading it."""

from collections.abc import Sequence

from experiments.common.results import Row
from nirvana.mri.reports.grammar import Facts

READ = "said"
"""Key of the facts that the model reports, as rows on disk have it."""


def with_facts(rows: Sequence[Row], facts: Sequence[Facts]) -> list[Row]:
    """The rows with other reported facts."""
    return [{**row, READ: each} for row, each in zip(rows, facts, strict=True)]
