"""Rows survive interruption and compression; tables have the cells of their head."""

import json
import lzma
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.common.program import make_parser, write_page
from experiments.common.results import append_row, append_rows, read_rows
from experiments.common.tables import show_p, table
from nirvana.errors import InputError

ROWS = [{"seed": seed, "bits": [0.5 * seed, 1.0], "name": "ν"} for seed in range(5)]


@pytest.fixture(params=["results.jsonl", "results.jsonl.xz"])
def path(tmp_path, request):
    return tmp_path / "new" / request.param


def test_rows_come_back(path):
    assert read_rows(path) == []
    for row in ROWS[:3]:
        append_row(path, row)
    append_rows(path, ROWS[3:])
    assert read_rows(path) == ROWS


def test_compressed_rows_are_plain_to_others(tmp_path):
    path = tmp_path / "results.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"a":1}\n{"a":2}\n'))
    append_row(path, {"a": 3})
    with lzma.open(path, "rt") as file:
        assert [json.loads(line) for line in file] == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_what_was_cut_off_is_left_out_and_removed(path):
    append_rows(path, ROWS[:2])
    whole = path.read_bytes()
    append_row(path, ROWS[2])
    both = path.read_bytes()
    for length in range(len(whole), len(both)):
        path.write_bytes(both[:length])
        assert read_rows(path) == ROWS[:2]
    append_row(path, ROWS[3])
    assert read_rows(path) == [*ROWS[:2], ROWS[3]]


def test_damage_before_the_end_is_refused(path):
    append_rows(path, ROWS)
    content = bytearray(path.read_bytes())
    content[3:6] = b"\x00\x00\x00"
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"line 1: not JSON|byte 0: not an \.xz stream"):
        read_rows(path)


def test_several_may_append_at_once(path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: append_row(path, {"seed": seed}), range(40)))
    assert sorted(row["seed"] for row in read_rows(path)) == list(range(40))


def test_numbers_that_json_lacks_are_not_written(path):
    append_row(path, ROWS[0])
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_rows(path, [ROWS[1], {"loss": float("nan")}])
    assert read_rows(path) == ROWS[:1]


def test_tables():
    assert table(["a", "b"], [[1, "x"]]) == "\n| a | b |\n| --- | --- |\n| 1 | x |\n"
    with pytest.raises(ValueError, match="2 columns has a row of 1"):
        table(["a", "b"], [[1]])
    assert [show_p(p) for p in (None, 0.0004, 0.0012, 0.25, 1.0)] == [
        "-",
        "< 0.001",
        "0.0012",
        "0.25",
        "1",
    ]


def test_programs(tmp_path, capsys):
    parser = make_parser("experiments.x.study", "Runs x.\n\nMore.")
    assert "python -m experiments.x.study" in parser.format_usage()
    assert "Runs x." in parser.format_help()
    assert "More" not in parser.format_help()
    write_page(tmp_path / "RESULTS.md", "text\n\n\n")
    assert (tmp_path / "RESULTS.md").read_text() == "text\n"
    assert "RESULTS.md" in capsys.readouterr().out
