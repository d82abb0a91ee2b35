"""S-NIAH, a single needle in a haystack: one sentence states a value, the last one requires it.

After the single-needle tasks of Hsieh et al., "RULER: What's the Real Context Size of Your
Long-Context Language Models?", arXiv 2404.06654:

    task  haystack                      key           value
    1     a few sentences, repeated     two words     seven digits
    2     real text                     two words     seven digits
    3     real text                     two words     a UUID (36 characters)

The figures are not comparable with RULER's: sentences, key words and haystack are ours (RULER uses
essays by Paul Graham; here any text file serves); there is no instruction before the haystack,
since base models do not follow any; a problem has exactly the given length, answer included; the
position of the needle is uniform over the sentence ends of the haystack instead of one of 40
depths; and an answer is right when greedy decoding starts with it, where RULER accepts it anywhere
in 128 tokens.
"""

import re
import uuid
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from nirvana.evaluate.recall import Problem

TASKS = (1, 2, 3)
NOISE = (
    "The hills are quiet today. Rain fell on the roof. A boat went down the river. "
    "Nobody was at the door. The road goes on from here."
)
# fmt: off
FIRST_WORDS = [
    "amber", "brave", "calm", "distant", "early", "famous", "gentle", "hollow", "iron",
    "jolly", "keen", "little", "mellow", "narrow", "odd", "patient", "quick", "royal",
    "silver", "tall", "urgent", "velvet", "wild", "young"
]
SECOND_WORDS = [
    "anchor", "bridge", "candle", "desert", "engine", "falcon", "garden", "harbor",
    "island", "jacket", "kettle", "lantern", "mirror", "needle", "orchard", "pencil",
    "quarry", "ribbon", "saddle", "tunnel", "umbrella", "valley", "window", "yard"
]
# fmt: on
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def make_niah(
    task: int,
    encode: Callable[[list[str]], list[list[int]]],
    bos: int,
    length: int,
    num_problems: int,
    haystack: Iterable[str] = (),
    seed: int = 0,
) -> Iterator[Problem]:
    """Generates problems of exactly `length` tokens.

    Args:
        task: 1, 2 or 3, see above.
        encode: texts to tokens, see `nirvana.data.tokenizer.text_encoder`.
        bos: the token that starts a document.
        length: tokens of a problem: BOS, haystack with needle, question and answer.
        num_problems: number of problems.
        haystack: documents for tasks 2 and 3, joined in order; only as many are read as the
            problems need. Each problem starts at a random sentence.
        seed: the same seed gives the same problems.

    Yields:
        The problems; the answer of each is its last tokens.

    Raises:
        ValueError: for an unknown task, a length without room for needle and question, or a
            haystack shorter than a problem.
    """
    if task not in TASKS:
        raise ValueError(f"S-NIAH {task} must be one of 1, 2, 3")
    hay, ends = _haystack([NOISE] if task == 1 else haystack, encode, length, repeat=task == 1)
    for number in range(num_problems):
        random = np.random.default_rng([seed, task, length, number])
        key = f"{random.choice(FIRST_WORDS)} {random.choice(SECOND_WORDS)}"
        if task == 3:
            what, value = "code", str(uuid.UUID(bytes=random.bytes(16), version=4))
        else:
            what, value = "number", str(random.integers(10**6, 10**7))
        needle, question, answer = encode(
            [
                f" The secret {what} of the {key} is {value}.",
                f" Which secret {what} was told? The secret {what} of the {key} is",
                f" {value}",
            ]
        )
        room = length - 1 - len(needle) - len(question) - len(answer)
        if room < 1:
            raise ValueError(
                f"length = {length} must be at least {length - room + 1}, the needle's and the "
                "question's own tokens"
            )
        if len(hay) < room:
            raise ValueError(f"the haystack has {len(hay)} tokens, fewer than the {room} needed")
        latest = int(np.searchsorted(ends, len(hay) - room, side="right"))
        start = int(ends[random.integers(latest)])
        candidates = ends[(ends >= start) & (ends <= start + room)]
        place = int(random.choice(candidates))
        tokens = [bos, *hay[start:place], *needle, *hay[place : start + room], *question, *answer]
        yield Problem(tokens, [(length - len(answer), length)])


def _haystack(
    documents: Iterable[str],
    encode: Callable[[list[str]], list[list[int]]],
    length: int,
    repeat: bool,
) -> tuple[list[int], np.ndarray]:
    """Tokens of the text's sentences, and the indices between sentences (0 included).

    Reads four times `length` at most, enough for problems that start at different sentences.
    """
    hay: list[int] = []
    ends = [0]
    enough = 4 * length
    for document in documents:
        sentences = [" " + " ".join(each.split()) for each in _SENTENCE_END.split(document)]
        encoded = encode([sentence for sentence in sentences if sentence.strip()])
        while encoded:
            for sentence in encoded:
                hay += sentence
                ends.append(len(hay))
            if not repeat or len(hay) >= enough:
                break
        if len(hay) >= enough:
            break
    return hay, np.array(ends)
