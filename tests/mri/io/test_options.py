"""Options of reading, from their texts."""

import pytest

from nirvana.cli.reading import read_options
from nirvana.errors import InputError
from nirvana.mri.io.options import (
    ReadOptions,
    parse_axes,
    parse_centre,
    parse_phase_encode,
    parse_select,
)


def test_the_defaults_leave_everything_to_the_file() -> None:
    assert read_options("auto", None, [], "auto", None, None) == ReadOptions()


def test_texts_become_values() -> None:
    found = read_options(
        *("3, 120", "2", ["contrast=1,repetition=0", "set=2"], "rows", "k", "row,column,coil")
    )
    assert found == ReadOptions(
        centre=(3, 120),
        measurement="2",
        select={"contrast": 1, "repetition": 0, "set": 2},
        phase_encode="rows",
        variable="k",
        axes=("row", "column", "coil"),
    )


@pytest.mark.parametrize("text", ["", "centre", "3", "3,", "3,4,5", "-1,2", "1.5,2", "a,b"])
def test_no_centre(text: str) -> None:
    with pytest.raises(InputError, match="--centre"):
        parse_centre(text)


@pytest.mark.parametrize(
    "texts", [[""], ["contrast"], ["contrast=-1"], ["echo=1"], ["set=65536"], ["set=1", "set=2"]]
)
def test_no_selection(texts: list[str]) -> None:
    with pytest.raises(InputError, match="--select"):
        parse_select(texts)


@pytest.mark.parametrize("text", ["", "row", "row,coil", "row,column,row", "row,column,echo"])
def test_no_axes(text: str) -> None:
    with pytest.raises(InputError, match="--axes"):
        parse_axes(text)


def test_no_phase_encode() -> None:
    with pytest.raises(InputError, match="--phase-encode"):
        parse_phase_encode("slices")
