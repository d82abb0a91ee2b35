"""MQAR, multi-query associative recall: a list of key-value pairs, then a query for each key.

After Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv
2312.04927. A problem is

    BOS  k1 v1  k2 v2 ... kN vN  | filler ... k3 v3 ... filler ... k1 v1 ... filler

where keys, values and filler are random tokens. After the bar every key occurs once more, in random
order and at random positions, and the value that follows it is the answer. Zoology spaces the
queries by a power law, leaves the answer out of the sequence (the label is at the key) and trains
models on the task alone; here the positions are uniform and the answer is read after it has been
scored, as in any text. Chance is 1 / `len(vocabulary)`.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from nirvana.evaluate.recall import Problem


def make_mqar(
    bos: int,
    vocabulary: Sequence[int],
    length: int,
    num_pairs: int,
    num_problems: int,
    seed: int = 0,
) -> Iterator[Problem]:
    """Generates problems of exactly `length` tokens.

    Args:
        bos: the token that starts a document.
        vocabulary: distinct tokens to draw keys, values and filler from. The keys and values of a
            problem are all distinct, and none of them occurs as filler.
        length: tokens of a problem, at least 1 + 4 `num_pairs`.
        num_pairs: N, pairs of a problem, at least 1.
        num_problems: number of problems.
        seed: the same seed gives the same problems.

    Yields:
        The problems; the answers of each are its N values in the second part.

    Raises:
        ValueError: for a vocabulary or length too small for the pairs.
    """
    if num_pairs < 1 or length < 1 + 4 * num_pairs:
        raise ValueError(
            f"length = {length} must be at least {1 + 4 * num_pairs} for {num_pairs} pairs"
        )
    if len(vocabulary) <= 2 * num_pairs:
        raise ValueError(
            f"{num_pairs} pairs need more than {2 * num_pairs} tokens, not {len(vocabulary)}"
        )
    tokens = np.asarray(vocabulary)
    for number in range(num_problems):
        random = np.random.default_rng([seed, length, num_pairs, number])
        drawn = random.permutation(tokens)
        keys, values = drawn[:num_pairs], drawn[num_pairs : 2 * num_pairs]
        pair_tokens = np.stack([keys, values], 1).ravel()
        order = random.permutation(num_pairs)
        # A query is a unit of two tokens, a filler a unit of one: draw the positions of units.
        num_filler = length - 1 - 4 * num_pairs
        places = np.sort(random.choice(num_filler + num_pairs, num_pairs, replace=False))
        starts = 1 + 2 * num_pairs + places + np.arange(num_pairs)
        sequence = np.empty(length, dtype=np.int64)
        sequence[0] = bos
        sequence[1 : 1 + 2 * num_pairs] = pair_tokens
        sequence[1 + 2 * num_pairs :] = random.choice(
            drawn[2 * num_pairs :], length - 1 - 2 * num_pairs
        )
        sequence[starts], sequence[starts + 1] = keys[order], values[order]
        answers = [(int(start) + 1, int(start) + 2) for start in starts]
        yield Problem(sequence.tolist(), answers)
