"""Parts of the page that need neither models nor its server."""

import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs the page's server: pip install 'nirvana[app]'")

from helpers.app_rooms import CHOICE
from nirvana.app import text_work
from nirvana.app.picker import parse
from nirvana.app.pictures import Window, coloured, error_scale, side_letters
from nirvana.app.tokens_html import tokens_html
from nirvana.app.uploads import checked_name
from nirvana.errors import InputError
from nirvana.mri.physics.masks import Sampling


@pytest.mark.parametrize(
    "name", ["../a.h5", "a/b.h5", "a\\b.h5", ".a.h5", "", "a\nb.h5", "a" * 300]
)
def test_names_that_are_no_plain_names_are_refused(name):
    with pytest.raises(InputError, match="name"):
        checked_name(name)


def test_the_window_and_the_zoom():
    image = np.arange(64, dtype=np.float32).reshape(8, 8)
    assert Window().grey(image, 63.0)[0, 0] == 0
    assert Window().grey(image, 63.0)[7, 7] == 255
    narrow = Window(level=50, width=2).grey(image, 63.0)
    assert set(narrow[:3].flatten()) == {0}
    assert set(narrow[5:].flatten()) == {255}
    np.testing.assert_array_equal(Window(zoom=4, row=0, column=100).part(image), image[:2, 6:])
    assert Window(zoom=100).part(image).shape == (1, 1)


def test_errors_have_one_colour_scale():
    small = coloured(np.array([[0.2]]), 0, 1.0, "inferno")
    other = coloured(np.array([[0.2, 1.0]]), 0, 1.0, "inferno")
    np.testing.assert_array_equal(small[0, 0], other[0, 0])


def test_sides_are_shown_where_they_are_known():
    radiological = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1.0]])
    assert side_letters(radiological) == ("R", "L")
    assert side_letters(radiological * [1, 1, -1, 1]) == ("L", "R")
    assert side_letters(radiological[:, [0, 2, 1, 3]]) is None
    assert side_letters(None) is None


def test_options_of_reading_are_parsed():
    sampling, seed, reading = parse(
        ("random", "8", 0.04, 3, "0,128", "rows", "row,column,coil", "x", "2", "contrast=1")
    )
    assert (sampling, seed) == (Sampling("random", 8.0, 0.04), 3)
    assert (reading.centre, reading.phase_encode, reading.select) == (
        (0, 128),
        "rows",
        {"contrast": 1},
    )
    assert parse(("random", "as measured", *CHOICE[2:]))[0] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a" * (text_work.MAX_CHARACTERS + 1)}, "at most 65,536"),
        ({"max_new_tokens": 0}, "tokens to write = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 0.0}, "top-p = 0.0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_requests_that_are_out_of_range_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        text_work.TextRequest(**{"prompt": "A prompt", **change}).check()


def test_a_model_without_trigger_has_no_gates():
    assert "this model has none" in tokens_html(["a"], [], (0.0, 0.0), "gate", "")


def test_the_scale_of_errors_suits_the_smallest():
    target = np.full((2, 10, 10), 2.0, np.float32)
    shown = {"fully sampled": target, "good": target + 0.08, "bad": target - 1.0}
    assert error_scale(shown, "fully sampled", white=2.0) == 0.05
    assert error_scale({"fully sampled": target, "bad": target - 1.0}, "fully sampled", 2.0) == 0.5
