"""Needles and associative recall: readers of the context find the answers, other models do not."""

import numpy as np
import pytest

from nirvana.data.tokenizer import text_encoder
from nirvana.evaluate.mqar import make_mqar
from nirvana.evaluate.niah import NOISE, make_niah
from nirvana.evaluate.recall import Problem, Recall, answer_all

TEXT = " ".join(f"On day {i} the keeper of house {7 * i} wrote a letter." for i in range(900))


@pytest.fixture
def needles(tokenizer):
    def make(task, length=400, number=12, haystack=(TEXT,), **more):
        encode, bos = text_encoder(tokenizer), tokenizer.bos_token_id
        return list(make_niah(task, encode, bos, length, number, haystack, **more))

    return make


@pytest.mark.parametrize("task", [1, 2, 3])
@pytest.mark.parametrize("length", [300, 401])
def test_a_problem_has_its_length_and_answers(needles, tokenizer, task, length):
    values = set()
    for problem in needles(task, length):
        assert len(problem.tokens) == length
        assert problem.tokens[0] == tokenizer.bos_token_id
        ((start, stop),) = problem.answers
        assert stop == length
        text = tokenizer.decode(problem.tokens[1:start])
        value = tokenizer.decode(problem.tokens[start:]).strip()
        assert len(value) == (36 if task == 3 else 7)
        assert text.count(value) == 1
        what = "code" if task == 3 else "number"
        key = text.rpartition(f"The secret {what} of the ")[2].removesuffix(" is")
        assert f"The secret {what} of the {key} is {value}." in text
        assert (NOISE.split(".")[0] in text) == (task == 1)
        assert ("the keeper of house" in text) == (task != 1)
        values.add(value)
    assert len(values) == 12


@pytest.mark.parametrize("task", [1, 2, 3])
def test_a_reader_finds_every_needle(needles, inductor, task):
    assert answer_all(inductor(), needles(task)).accuracy == 1.0


@pytest.mark.parametrize("task", [1, 2, 3])
def test_a_guesser_finds_none(needles, guesser, task):
    assert answer_all(guesser(range(280)), needles(task)).accuracy == 0.0


def test_a_short_window_finds_only_near_needles(needles, inductor):
    """The share that is found is the share of needles in sight: they lie all along the text."""
    problems = needles(2, 800, 40)
    recall = answer_all(inductor(window=400), problems)
    assert 0.1 < recall.accuracy < 0.8
    assert answer_all(inductor(window=100), problems).accuracy < recall.accuracy


def test_pieces_change_nothing(needles, inductor, tokenizer):
    model = inductor(window=400)
    problems = needles(2, 800, 6)
    whole = answer_all(model, problems)
    assert 0 < whole.accuracy < 1
    for piece in (1, 7, 64):
        assert answer_all(model, problems, piece) == whole


@pytest.mark.parametrize("batch_size", [2, 3, 9])
def test_problems_are_read_together_as_alone(small_model, batch_size):
    model = small_model()
    dice = np.random.default_rng(0)
    rows = [dice.integers(0, 5, length).tolist() for length in (40, 9, 40, 23, 40)]
    problems = [Problem(row, [(at, at + 1) for at in range(3, len(row))]) for row in rows]
    alone = answer_all(model, problems)
    assert alone.accuracy > 0
    for piece in (2048, 30):
        assert answer_all(model, problems, piece, batch_size) == alone


def test_problems_are_of_their_seed(needles):
    assert needles(2) == needles(2)
    assert needles(2, number=5) == needles(2)[:5]
    assert all(a != b for a, b in zip(needles(2), needles(2, seed=1), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": 4}, "one of 1, 2, 3"),
        ({"task": 1, "length": 40}, "length = 40 must be at least"),
        ({"task": 2, "haystack": ["Too short. " * 9]}, "the haystack has"),
        ({"task": 3, "haystack": []}, "the haystack has 0 tokens"),
    ],
)
def test_impossible_needles(needles, arguments, message):
    with pytest.raises(ValueError, match=message):
        needles(**arguments)


@pytest.mark.parametrize(("length", "pairs"), [(33, 8), (64, 8), (200, 1), (301, 60)])
def test_mqar_has_its_pairs_and_queries(length, pairs):
    for problem in make_mqar(0, range(1, 200), length, pairs, 10):
        assert (len(problem.tokens), problem.tokens[0]) == (length, 0)
        facts = problem.tokens[1 : 1 + 2 * pairs]
        memory = dict(zip(facts[::2], facts[1::2], strict=True))
        assert len({*facts}) == 2 * pairs
        rest = problem.tokens[1 + 2 * pairs :]
        assert len(problem.answers) == pairs
        for start, stop in problem.answers:
            assert stop == start + 1
            assert memory[problem.tokens[start - 1]] == problem.tokens[start]
        assert all(rest.count(token) == 1 for token in facts)


def test_mqar_reader_and_guesser(inductor, guesser):
    """Chance: each of 40 tokens is foretold alike."""
    problems = list(make_mqar(0, range(1, 41), 60, 12, 60))
    assert answer_all(inductor(order=1), problems).accuracy == 1.0
    chance = answer_all(guesser(range(1, 41)), problems)
    assert abs(chance.accuracy - 1 / 40) < 5 * (1 / 40 * 39 / 40 / 720) ** 0.5
    assert chance.accuracy > 0
    few = list(make_mqar(0, range(1, 100), 200, 4, 30))
    assert answer_all(inductor(window=2, order=1), few).accuracy == 0.0


def test_impossible_mqar():
    with pytest.raises(ValueError, match="must be at least 33"):
        next(make_mqar(0, range(1, 99), 32, 8, 1))
    with pytest.raises(ValueError, match="more than 16 tokens"):
        next(make_mqar(0, range(1, 17), 64, 8, 1))


def test_error_is_that_of_the_mean():
    recall = Recall([0.0, 1.0, 1.0, 0.0], "")
    assert recall.accuracy == 0.5
    assert recall.error == pytest.approx((1 / 3) ** 0.5 / 2)
    assert Recall([1.0], "").error == 0.0
