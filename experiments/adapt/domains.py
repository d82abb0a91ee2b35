"""The domains of the study, as data: those that `tiny` was trained on, and others."""

from dataclasses import dataclass

SEEN = ("general", "novels", "biomed", "law", "finance")
"""Domains of the training text."""


@dataclass(frozen=True)
class Source:
    """Files of a Debian package that make a domain.

    Attributes:
        package: name of the package.
        pattern: of the files' names within it.
        licence: of these files.
        about: what they are.
        manual: whether they are manual pages, whose markup is removed.
        piece: bytes after which a file is cut; 0: files are whole documents.
    """

    package: str
    pattern: str
    licence: str
    about: str
    manual: bool = False
    piece: int = 0


UNSEEN = {
    "python": Source(
        "libpython3.11-stdlib", "**/python3.11/**/*.py", "PSF-2.0", "Python's standard library"
    ),
    "perl": Source(
        "perl-modules-5.36",
        "**/perl/5.36.0/**/*.pm",
        "Artistic or GPL-1+",
        "modules that come with Perl",
    ),
    "go": Source(
        "golang-1.19-src", "**/go-1.19/src/**/*.go", "BSD-3-Clause", "Go's standard library"
    ),
    "german": Source(
        "manpages-de",
        "**/man/de/**/*.gz",
        "GPL-3+ and those of the originals",
        "manual pages in German",
        manual=True,
    ),
    "polish": Source(
        "manpages-pl",
        "**/man/pl/**/*.gz",
        "GPL-3+ and those of the originals",
        "manual pages in Polish",
        manual=True,
    ),
    "metamath": Source(
        "metamath-databases",
        "**/set.mm*",
        "CC0-1.0",
        "formal proofs of set.mm",
        piece=100_000,
    ),
}
"""Domains never trained on, for the test."""

VALIDATION = {
    "rust": Source(
        "rust-src", "**/library/**/*.rs", "MIT or Apache-2.0", "Rust's standard library"
    ),
    "spanish": Source(
        "manpages-es",
        "**/man/es/**/*.gz",
        "GPL-3+ and those of the originals",
        "manual pages in Spanish",
        manual=True,
    ),
}
"""Domains never trained on, from which settings are chosen; no document of them is tested."""
