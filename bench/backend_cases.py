"""Where inputs may lie, and which of them the page cache may hold, when a merge begins."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("auto", "mmap", "pread", "direct")


@dataclass(frozen=True)
class Case:
    """A state in which a merge finds its inputs.

    Attributes:
        cached: the share of each file, from its beginning, that the page cache holds: of post, base, new base.
        place: the filesystem of the inputs; the output is on the disk, but where they are on a tmpfs.
    """

    name: str
    cached: tuple[float, float, float]
    explanation: str
    place: str = "disk"


CASES = (
    Case(
        "warm", (1, 1, 1), "Nothing has to be fetched: mapping copies nothing, and a direct read fetches it all again."
    ),
    Case("cold", (0, 0, 0), "Everything has to be fetched: a direct read is one large request, and no page is made."),
    Case("one cached", (0, 1, 0), "`auto` decides for each file: one is mapped, two are read directly."),
    Case("two cached", (0, 1, 1), "The same the other way round: two are mapped, one is read directly."),
    Case("half of each", (0.5, 0.5, 0.5), "The border: `auto` maps a file of which half is cached, and no less."),
    Case(
        "tmpfs",
        (1, 1, 1),
        "Inputs and output are in memory: a direct read is a copy like any other, mapping is none.",
        "tmpfs",
    ),
    Case("overlay, warm", (1, 1, 1), "As warm: the cache is that of the filesystem below.", "overlay"),
    Case("overlay, cold", (0, 0, 0), "As cold: the layer hands requests on as they are.", "overlay"),
)
