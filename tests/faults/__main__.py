"""Run everything, or with arguments every N-th step and so many cuts, and write the record."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.cases import POWER_CUT, Ground, Report, every_step, power_cuts
from tests.faults.failures import FAULTS
from tests.faults.merges import SCENES

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORD = Path(__file__).parents[2] / "docs" / "faults.md"


def run(root: Path, stride: int, cuts: int) -> Report:
    """Let everything happen at every step, or at every so many."""
    ground = Ground(root)
    report = Report(Counter(), [])
    for scene in SCENES:
        for fault in FAULTS:
            every_step(ground, scene, fault, stride, report)
        power_cuts(ground, scene, stride, cuts, report)
    return report


def rows(report: Report) -> Iterator[str]:
    """Yield the lines of a table: faults down, scenes across."""
    yield f"| fault | {' | '.join(scene.name for scene in SCENES)} |"
    yield f"|---|{'--:|' * len(SCENES)}"
    for kind in (*FAULTS, POWER_CUT):
        yield f"| {kind} | {' | '.join(str(report.cases[scene.name, kind]) for scene in SCENES)} |"


def main() -> int:
    """Return 1 where anything went wrong."""
    stride, cuts = (int(argument) for argument in sys.argv[1:3]) if len(sys.argv) > 2 else (1, 6)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="paramdelta-faults-") as root:
        report = run(Path(root).resolve(), stride, cuts)
    seconds = time.monotonic() - started
    record = f"""# Faults

Written by `python -m tests.faults` (`make faults`): a merge is disturbed at each of its steps, one case each. A step is
a system call that creates, writes, reserves, cuts, sends out, syncs, renames or removes; for the faults of reading, one
that reads. A power cut leaves what was synced and any part of what was not, and must not cost a shard whose record was
synced. After each case the promise is checked, and the merge repeated: the files must be those of a merge that nothing
disturbed, inputs and the user's files untouched.

{chr(10).join(rows(report))}

**{sum(report.cases.values()):,} cases, {len(report.wrong)} of them wrong**, in {seconds:.0f} s.
"""
    print(record)
    print("\n".join(report.wrong[:40]))
    if stride == 1 and not report.wrong:
        RECORD.write_text(record, encoding="utf-8")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
