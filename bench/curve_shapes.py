"""Which settings are varied, and what is asked of each curve."""

from __future__ import annotations

from dataclasses import dataclass

from bench.triple import ROLES


@dataclass(frozen=True)
class Point:
    """One setting, or one state of the page cache."""

    label: str
    x: float
    options: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()  # the checkpoints that lie in the page cache; the others do not


@dataclass(frozen=True)
class Series:
    """Points that are joined by a line."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curve:
    """One chart and one table."""

    key: str
    title: str
    axis: str
    explanation: str
    series: tuple[Series, ...]
    logarithmic: bool = False  # the axis of the settings


@dataclass(frozen=True)
class Sample:
    """One run."""

    curve: str
    series: str
    point: str
    round: int
    seconds: float
    peak_rss_bytes: int
    io: str
    workers: int
    window_bytes: int


CACHED = {"warm": ROLES, "cold": ()}
STATES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("none", ()),
    ("base", ("base",)),
    ("base, post", ("base", "post")),
    ("all", ROLES),
)
WORKERS = (1, 2, 3, 4, 6, 8)
MEGABYTES = (200, 256, 300, 400, 600, 1000, 2000)


def over_workers(state: str) -> Series:
    """Vary the number of workers."""
    points = [Point(str(count), count, ("--workers", str(count)), CACHED[state]) for count in WORKERS]
    return Series(state, tuple(points))


def over_memory(state: str) -> Series:
    """Vary the memory budget, and with it the windows."""
    points = [Point(f"{size} MB", size, ("--memory", f"{size}MB"), CACHED[state]) for size in MEGABYTES]
    return Series(state, tuple(points))


def over_cached_files(backend: str) -> Series:
    """Vary how many of the three inputs the page cache holds."""
    points = [Point(label, place, ("--io", backend), cached) for place, (label, cached) in enumerate(STATES)]
    return Series(backend, tuple(points))


CURVES = (
    Curve(
        "workers",
        "Workers",
        "workers",
        "The axis is `--workers`. Warm, another worker pays as long as a core is free for it; cold, as long as the"
        " device has too few requests to work on. From there on the line should be flat: idle threads cost nothing.",
        tuple(over_workers(state) for state in CACHED),
    ),
    Curve(
        "memory",
        "Memory, and with it windows",
        "`--memory`, MB, logarithmic",
        "The axis is `--memory`, which bounds the whole process. Workers and windows are chosen to fit, up to sizes"
        " beyond which larger ones are not faster. So the line should fall at first and then be flat: a small budget"
        " means few or small windows, and small requests to the device. A budget without a figure was refused as too"
        " small.",
        tuple(over_memory(state) for state in CACHED),
        logarithmic=True,
    ),
    Curve(
        "cached",
        "Inputs in the page cache",
        "inputs in the page cache",
        "The axis is which of the three inputs lie in the page cache when the command starts; each line is a way to"
        " read, `--io`. `auto` decides for each file, so it should be with the lowest of the other lines everywhere, or"
        " below them where some files are cached and others are not.",
        tuple(over_cached_files(backend) for backend in ("auto", "mmap", "pread", "direct")),
    ),
)
