"""Training text of another look: domains that nobody trained on, made from those of the training.

Step sizes learned on the training text alone would suit a model that has nothing to learn. Each
document is changed as a whole, by one of these, with parameters of its own.
"""

import random
import string
from collections.abc import Callable

ACCENTED = "äöüßéèêçñåøæłóżźćśąęčřšžýáíúů"


def plain(text: str, source: random.Random) -> str:
    """The text itself."""
    return text


def upper(text: str, source: random.Random) -> str:
    """All in capitals."""
    return text.upper()


def substituted(text: str, source: random.Random) -> str:
    """Some letters exchanged for others, the same way throughout the document."""
    letters = list(string.ascii_lowercase)
    chosen = source.sample(letters, source.randint(2, 26))
    other = source.sample(chosen, len(chosen))
    table = dict(zip(chosen, other, strict=True))
    table |= {a.upper(): b.upper() for a, b in table.items()}
    return text.translate(str.maketrans(table))


def accented(text: str, source: random.Random) -> str:
    """Some letters exchanged for accented ones."""
    chosen = source.sample(list(string.ascii_lowercase), source.randint(2, 8))
    table = {letter: source.choice(ACCENTED) for letter in chosen}
    return text.translate(str.maketrans(table))


def identifiers(text: str, source: random.Random) -> str:
    """Sentences as lines of code: words joined, brackets, indentation."""
    joint, opening, closing = (
        source.choice(["_", ".", "->", ""]),
        *source.choice(["()", "{}", "[]"]),
    )
    lines = []
    for sentence in text.replace("\n", " ").split(". "):
        words = sentence.split()
        size = source.randint(1, 3)
        parts = [joint.join(words[i : i + size]) for i in range(0, len(words), size)]
        if not joint:
            parts = ["".join(word.capitalize() for word in part.split()) for part in parts]
        indent = " " * 4 * source.randint(0, 2)
        lines.append(f"{indent}{' '.join(parts[:2])}{opening}{', '.join(parts[2:])}{closing};")
    return "\n".join(lines)


def reversed_words(text: str, source: random.Random) -> str:
    """The words of each line in the opposite order."""
    return "\n".join(" ".join(line.split()[::-1]) for line in text.split("\n"))


SHIFTS: tuple[Callable[[str, random.Random], str], ...] = (
    plain,
    upper,
    substituted,
    accented,
    identifiers,
    reversed_words,
)


def shifted(text: str, seed: int) -> str:
    """A text, changed by one of `SHIFTS`.

    Args:
        text: of a document.
        seed: of the choice and its parameters.

    Returns:
        the changed text.
    """
    source = random.Random(seed)
    return source.choice(SHIFTS)(text, source)
