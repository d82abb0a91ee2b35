"""What a page serves, and its limits."""

from dataclasses import dataclass

from nirvana.config import require

MIB = 2**20


@dataclass(frozen=True)
class AppConfig:
    """Settings of the page.

    Attributes:
        codec: folder or packaged name of the codec that reconstructs.
        reporter: the same of the codec that reports.
        model: the same of the language model.
        device: on which they compute.
        max_mb: MiB of a session's uploads, and of the largest array and unpacked file that are
            read of them.
        max_seconds: after which work is stopped, at its next slice or token.
        max_sessions: people at once.
        idle_minutes: after which a session is closed.
    """

    codec: str = "codec"
    reporter: str = "reporter"
    model: str = "tiny"
    device: str = "cpu"
    max_mb: int = 512
    max_seconds: float = 600.0
    max_sessions: int = 50
    idle_minutes: float = 60.0

    def __post_init__(self) -> None:
        require(self.max_mb >= 1, "max_mb", self.max_mb, "at least 1")
        require(self.max_seconds > 0, "max_seconds", self.max_seconds, "above 0")
        require(self.max_sessions >= 1, "max_sessions", self.max_sessions, "at least 1")
        require(self.idle_minutes > 0, "idle_minutes", self.idle_minutes, "above 0")

    @property
    def max_bytes(self) -> int:
        """`max_mb` in bytes."""
        return self.max_mb * MIB
