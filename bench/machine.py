"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

# Prints "name version" of what is installed, in whichever interpreter runs it.
PRINT_VERSIONS = """
import importlib.metadata, platform, sys
print("Python", platform.python_version())
for name in sys.argv[1:]:
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
"""


def memory_bytes() -> int:
    """Return the size of physical memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_model() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def filesystem(directory: Path) -> str:
    """Return the type of the filesystem that the directory lies on."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, fstype, *_ = line.split()
        if directory.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, fstype
    return kind


def describe(directory: Path) -> dict[str, str]:
    """Describe the machine and the filesystem under the directory."""
    return {
        "CPU": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "RAM": f"{memory_bytes() / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": filesystem(directory),
    }


def versions(python: Path, *packages: str) -> str:
    """Return the versions of an interpreter and of packages in its environment, in one line."""
    try:
        done = subprocess.run(
            [str(python), "-c", PRINT_VERSIONS, *packages], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    return ", ".join(done.stdout.strip().splitlines())
