"""What makes a run resumable: a record of each finished shard, synced before it counts.

The first line says what is being merged; every further one what must not be forgotten of a shard. A line that a death
cut short does not count, nor does anything behind it. Runs that make some of the shards each leave a file for every one
instead: nobody else writes to that.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.checkpoint.files import read_whole
from paramdelta.engine.digests import Digest
from paramdelta.engine.progress import FinishedShard, NonFinite, Requantised
from paramdelta.engine.sums import DeltaSums, Measured
from paramdelta.errors import CheckpointError, OutputError
from paramdelta.storage import platform

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from paramdelta.planning.plan import Plan

JOURNAL: Final = "journal.jsonl"
FRESH_JOURNAL: Final = "journal.jsonl.new"
RECORD: Final = ".record"
"""How the name of a file ends that records one shard, in the place of a line of the journal."""

# 16 digits for each 4 MiB of shards: 5.6 MB for a 671B model in bf16. What there may be to record of its 90,000 tensors
# takes 22 MB more at most with one delta, and 11 MB with each further one.
_MOST_BYTES: Final = 512 << 20


class Journal(NamedTuple):
    """What an earlier run recorded: the identity of its merge, and its finished shards by name."""

    identity: Any
    shards: dict[str, FinishedShard]


def read_journal(staging: Path, plan: Plan) -> Journal | None:
    """Return what an earlier run recorded in a staging directory; None where there is nothing that makes sense.

    Shards that the plan does not have, or has otherwise, are left out.

    Raises:
        OutputError: there is a journal, and the system does not give it: no reason to forget what is finished.
    """
    path = staging / JOURNAL
    if not os.path.lexists(path):
        return None
    try:
        raw = read_whole(path, _MOST_BYTES)
    except CheckpointError as error:
        raise OutputError(
            f"the journal of an unfinished merge cannot be used: {error.message}",
            file=str(path),
            remedy="Mend that and repeat the command, or use --overwrite to start anew.",
        ) from error
    lines = raw.split(b"\n")[:-1]  # what no newline ends was cut short
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    if not records or not isinstance(records[0], dict) or "identity" not in records[0]:
        return None
    numbers = {shard.name: number for number, shard in enumerate(plan.shards)}
    found: dict[str, FinishedShard] = {}
    for record in records[1:]:
        try:
            name = record["shard"]
            if record["bytes"] == plan.shards[numbers[name]].size:
                found[name] = _parse(record, numbers[name])
        except (TypeError, KeyError, ValueError, AttributeError):
            break
    return Journal(records[0]["identity"], found | _recorded_apart(staging, numbers, plan))


def _recorded_apart(staging: Path, numbers: Mapping[str, int], plan: Plan) -> dict[str, FinishedShard]:
    """Return the shards that have a file of their own, by name; what makes no sense is left out."""
    found = {}
    for name, number in numbers.items():
        path = staging / f"{name}{RECORD}"
        if os.path.lexists(path):
            with contextlib.suppress(CheckpointError, TypeError, KeyError, ValueError, AttributeError, RecursionError):
                record = json.loads(read_whole(path, _MOST_BYTES))
                if record["merge"] == plan.fingerprint and record["bytes"] == plan.shards[number].size:
                    found[name] = _parse(record, number)
    return found


def record_apart(staging: Path, finished: FinishedShard, plan: Plan) -> None:
    """Record a shard that lies on stable storage in a file of its own, durably. Raises OSError."""
    path = staging / f"{plan.shards[finished.number].name}{RECORD}"
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = platform.open_for_writing(str(fresh))
    try:
        content = bytearray(json.dumps(_record(finished, plan) | {"merge": plan.fingerprint}).encode())
        platform.write_all(descriptor, memoryview(content), 0)
        platform.sync_file(descriptor)
    finally:
        os.close(descriptor)
    fresh.replace(path)
    platform.sync_directory(staging)


def _parse(record: dict[str, Any], number: int) -> FinishedShard:
    regions = record["regions"]
    return FinishedShard(
        number,
        Digest(record["xxh3"], tuple(regions[begin : begin + 16] for begin in range(0, len(regions), 16))),
        {name: NonFinite(int(i), int(n)) for name, (i, n) in record["nonfinite"].items()},
        tuple(Requantised(str(name), float(error), float(size)) for name, error, size in record["requantised"]),
        {
            name: Measured(tuple(map(DeltaSums.parse, deltas)), tuple(map(float, products)))
            for name, (deltas, products) in record["sums"].items()
        },
    )


class JournalWriter:
    """Appends to the journal of a run. Methods raise OSError where the system refuses."""

    def __init__(
        self, staging: Path, identity: dict[str, Any], finished: Mapping[str, FinishedShard], plan: Plan
    ) -> None:
        self._plan = plan
        self._path = staging / JOURNAL
        self._offset = 0
        lines = [{"identity": identity}]
        lines += [_record(shard, plan) for shard in finished.values()]
        fresh = staging / FRESH_JOURNAL
        fresh.unlink(missing_ok=True)
        self._descriptor = platform.open_for_writing(str(fresh))
        try:
            for line in lines:
                self._append(line)
            platform.sync_file(self._descriptor)
            fresh.replace(self._path)
            platform.sync_directory(staging)
        except BaseException:
            self.close()
            raise

    def add(self, finished: FinishedShard) -> None:
        """Record a shard that lies on stable storage, durably."""
        self._append(_record(finished, self._plan))
        platform.sync_file(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _append(self, content: dict[str, Any]) -> None:
        line = bytearray(f"{json.dumps(content)}\n".encode())
        platform.write_all(self._descriptor, memoryview(line), self._offset)
        self._offset += len(line)


def _record(finished: FinishedShard, plan: Plan) -> dict[str, Any]:
    shard = plan.shards[finished.number]
    return {
        "shard": shard.name,
        "bytes": shard.size,
        "xxh3": finished.digest.whole,
        "regions": "".join(finished.digest.regions),
        "nonfinite": {name: list(asdict(found).values()) for name, found in finished.nonfinite.items()},
        "requantised": [list(lost) for lost in finished.requantised],
        "sums": finished.measured,
    }
