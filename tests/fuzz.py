"""`python -m tests.fuzz` (`make fuzz`): the tests on hostile input, over and over, for FUZZ_MINUTES.

Seeds are new each time, or follow from FUZZ_SEED.

Hypothesis shrinks what fails, and the seed repeats it; a case that was found belongs into the tests, written out.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Examples for each test, 0 where the tests just run as tests."""

TESTS = ("tests/checkpoint/test_header_differential.py", "tests/test_hostile.py")


def main() -> int:
    """Run until the time is over, or something fails."""
    ends = time.monotonic() + 60 * float(os.environ.get("FUZZ_MINUTES", "10"))
    seeds = random.Random(os.environ.get("FUZZ_SEED"))
    rounds = 0
    while time.monotonic() < ends:
        seed = seeds.randrange(2**32)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", f"--hypothesis-seed={seed}", *TESTS]
        environment = os.environ | {"FUZZ_EXAMPLES": "3000"}
        run = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment)
        if run.returncode != 0:
            print(f"failed with --hypothesis-seed={seed}, FUZZ_EXAMPLES=3000")
            return 1
        rounds += 1
    print(f"{rounds} rounds, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
