from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from paramdelta.storage import process

MIB = 1 << 20


def test_the_limit_of_open_files_is_lifted_and_never_lowered() -> None:
    resource = pytest.importorskip("resource", reason="no resource limits on this system")
    # In a process of its own: a lowered hard limit could not be raised again for other tests.
    program = (
        "import resource\n"
        "from paramdelta.storage import process\n"
        "for soft, hard, after in ((64, 5000, 4096), (64, 1000, 1000), (900, 1000, 1000)):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "    process.raise_open_file_limit()\n"
        "    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (after, hard)\n"
        "    process.raise_open_file_limit()\n"
        "    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (after, hard)\n"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 5000:
        pytest.skip(f"the hard limit of open files is {hard} here")
    subprocess.run([sys.executable, "-c", program], check=True)


def test_peak_rss_is_at_least_what_the_process_holds_now() -> None:
    psutil = pytest.importorskip("psutil")
    assert process.peak_rss() > 1_000_000
    assert process.peak_rss() >= psutil.Process().memory_info().rss - MIB


def test_peak_rss_grows_with_touched_memory_and_does_not_fall_again() -> None:
    # In a process of its own: how high other tests drove this one's peak is not known. Linux sums per-processor
    # counters that lag by some pages each, so the peak it reports can go back by a little.
    program = (
        "from paramdelta.storage import process\n"
        "before = process.peak_rss()\n"
        "memory = bytearray(b'x') * (64 << 20)\n"
        "during = process.peak_rss()\n"
        "del memory\n"
        "after = process.peak_rss()\n"
        "assert 60 << 20 <= during - before <= 80 << 20, (before, during)\n"
        "assert after >= during - (1 << 20), (during, after)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_peak_rss_is_known_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoProc:
        def __init__(self, _: str) -> None:
            pass

        def open(self, **_: str) -> None:
            raise FileNotFoundError

    monkeypatch.setattr(process, "Path", NoProc)
    assert 1_000_000 < process.peak_rss() < 1 << 40


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, ""), True),
        (caused_by(ValueError(), caused_by(ValueError(), MemoryError())), True),
        (ImportError("x.so: failed to map segment from shared object"), True),
        (ModuleNotFoundError("no module named failed to map segment"), False),
        (ImportError("x.so: undefined symbol"), False),
        (OSError(errno.EIO, ""), False),
        (ValueError(), False),
        (None, False),
    ],
)
def test_want_of_memory_is_seen_behind_other_errors(error: Exception | None, lacks: bool) -> None:
    assert process.lacks_memory(error) == lacks
