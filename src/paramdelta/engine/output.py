"""The output directory: locked, staged in ``.paramdelta/``, published index last, or left as it was found.

If the index (or the single model file) exists under its final name, everything that it names is complete and synced.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import TYPE_CHECKING, Any, Final

from paramdelta.checkpoint.discovery import STAGING
from paramdelta.checkpoint.files import open_file
from paramdelta.checkpoint.wording import listed, printable, quoted
from paramdelta.engine.inputs import check_identity
from paramdelta.engine.location import free_space, make_directories, refusals, refuse_inputs
from paramdelta.engine.receipt import RECEIPT, is_abandoned, listed_files, read_receipt, sealed
from paramdelta.engine.staging import PROBE, Staging
from paramdelta.errors import InputChangedError, OutputError
from paramdelta.planning.layout import INDEX_FILE, SINGLE_FILE
from paramdelta.planning.plan import InputFile
from paramdelta.planning.units import format_size
from paramdelta.storage import platform
from paramdelta.storage.sink import FileSink, output_refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from paramdelta.checkpoint.files import OpenFile
    from paramdelta.checkpoint.sidecars import Sidecar
    from paramdelta.engine.progress import FinishedShard
    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.plan import Plan

DOCUMENTS: Final = ("recipe.yaml", "README.md")
"""What every output has beside weights, sidecars and receipt."""

_CHUNK: Final = 4 << 20
_LARGE_FILE: Final = 1 << 32
_ANOTHER_OUTPUT: Final = "Choose another output."


class OutputDirectory:
    """OUT while a run writes it. As a context manager it holds the lock, and cleans up unless `publish` was reached.

    Entering touches nothing but the staging directory; `begin` is the point from which an old output is gone.

    Raises:
        OutputError: OUT exists and may not be replaced, is an input, is locked by another run, or cannot be written.
    """

    def __init__(self, path: Path, plan: Plan, *, overwrite: bool, patience: float = 0) -> None:
        self.path = path
        self._patience = patience
        self._plan = plan
        self._overwrite = overwrite
        self.staging = Staging(path, plan)
        self._staging = self.staging.path
        self._created: list[Path] = []
        self._published = False
        weights = sorted((shard.name for shard in plan.shards), key=SINGLE_FILE.__eq__)
        index = [INDEX_FILE] if plan.layout.index is not None else []
        # Receipt first: whatever a death leaves behind is listed. What makes the output loadable comes last.
        self.sidecar_digests: dict[str, str] = {}  # SHA-256 in hex, of each that was copied
        self._names = [RECEIPT, *DOCUMENTS, *(car.name for car in plan.sidecars), *weights, *index]

    def __enter__(self) -> Self:
        try:
            with refusals(self.path):
                refuse_inputs(self.path, self._plan)
                self._refuse_strangers()
                make_directories(self._staging, self._created)
                self.staging.acquire(created=self._staging in self._created, patience=self._patience)
                self._refuse_strangers()  # another run may have ended between the first look and the lock
                self.staging.take_stock(overwrite=self._overwrite, published=self._own_files())
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._clean_up()

    def look(self) -> None:
        """See what `__enter__` would find, and touch nothing. Raises as that does, unless a lock is in the way."""
        with refusals(self.path):
            refuse_inputs(self.path, self._plan)
            self._refuse_strangers()
            if self.staging.path.is_dir():
                self.staging.take_stock(overwrite=self._overwrite, published=self._own_files())

    def begin(self) -> None:
        """Remove the old output, once nothing that can be known speaks against the new one; copy the sidecars.

        Raises:
            OutputError: a file in OUT is in the way, the disk is too small, or the system refuses.
            InputChangedError: a sidecar is not what it was when the plan was made.
            CheckpointError: a sidecar cannot be read.
        """
        self._start(self._check())

    def begin_some(self, shards: Sequence[OutputShard], recipe: str) -> None:
        """Make ready for runs that make some of the shards each, this one these. Raises as `begin`."""
        with refusals(self.path):
            self._refuse_strangers()
            receipt = read_receipt(self.path)
            self._refuse_occupied(set() if receipt is None else {*listed_files(receipt), RECEIPT})
            _refuse_full_disk([self.path], sum(shard.size for shard in shards), 0)
            self._refuse_small_files()
            self._check_sidecars()
            self.staging.begin_some(recipe)

    def _check(self) -> list[str]:
        """Return the names of old files that go. Raises as `begin`, before anything is touched."""
        with refusals(self.path):
            self._refuse_strangers()
            receipt = read_receipt(self.path)
            listed = listed_files(receipt)
            old = [name for name in listed if name not in self.staging.finished]
            self._refuse_occupied(set() if receipt is None else {*listed, RECEIPT})
            _refuse_full_disk([self.path], *self._space(old))
            self._refuse_small_files()
            self._check_sidecars()
        return old

    def _start(self, old: Sequence[str]) -> None:
        with refusals(self.path):
            self._remove_old(old)
            self.staging.begin()
            for car in self._plan.sidecars:
                self.sidecar_digests[car.name] = _copy_durably(car, self._staging / car.name)
            self._check_sidecars()

    def create(self, shard: OutputShard) -> FileSink:
        """Return the sink of a shard, in the staging directory."""
        return FileSink(self._staging / shard.name, shard.size)

    def completed(self, finished: FinishedShard, /) -> None:
        """Record a finished shard, durably: a later run need not make it again."""
        with refusals(self.path):
            self.staging.record(finished)

    def publish(self, receipt: dict[str, Any], documents: Mapping[str, bytes]) -> None:
        """Give everything its final name, the index last.

        Args:
            receipt: what the output says of how it was made, every file of it listed.
            documents: content of each of `DOCUMENTS`.

        Raises:
            OutputError: the system refuses; the index is then not in place.
            InputChangedError: an input is not what it was when the plan was made.
        """
        with refusals(self.path):
            for file in self._plan.files:
                check_identity(file)
            self._check_sidecars()
            _write_durably(self._staging / RECEIPT, sealed(receipt))
            for name in DOCUMENTS:
                _write_durably(self._staging / name, [documents[name]])
            if self._plan.layout.index is not None:
                _write_durably(self._staging / INDEX_FILE, [self._plan.layout.index])
            platform.sync_directory(self._staging)
            ours = {name for name in self.staging.finished if not os.path.lexists(self._staging / name)}
            self._refuse_occupied(ours | ({RECEIPT} if read_receipt(self.path) is not None else set()))
            renamed: list[str] = []
            try:
                self._rename(self._names[:1], renamed)
                self._rename(self._names[1:-1], renamed)
                self._rename(self._names[-1:], renamed)
            except BaseException:
                self._withdraw(renamed)
                raise
        self._created = []
        self._published = True

    def _own_files(self) -> set[str]:
        """Return the names of files that a run of this very merge, which died, has published already."""
        receipt = read_receipt(self.path)
        if receipt is None or receipt["fingerprint"] != self._plan.fingerprint:
            return set()
        return {name for name in listed_files(receipt) if os.path.lexists(self.path / name)}

    def _rename(self, names: list[str], renamed: list[str]) -> None:
        for name in names:
            renamed.append(name)
            if name not in self.staging.finished or os.path.lexists(self._staging / name):
                (self._staging / name).replace(self.path / name)
        platform.sync_directory(self.path)

    def _withdraw(self, names: list[str]) -> None:
        """Take back what was published: first, durably, what makes it loadable; if that fails, nothing is taken back.

        The receipt goes last and only if all else is gone: a later run clears by it. It stays, too, where OUT holds
        files of the user's: it tells that the rest of OUT is ours.
        """
        with contextlib.suppress(OSError):
            for group in (names[len(self._names) - 1 :], names):
                self._keep_shards(group)
                self._remove([name for name in reversed(group) if name != RECEIPT])
            if {entry.name for entry in self.path.iterdir()} <= {STAGING, RECEIPT}:
                self._remove([RECEIPT])

    def _keep_shards(self, names: list[str]) -> None:
        for name in reversed(names):
            if name in self.staging.finished and os.path.lexists(self.path / name):
                (self.path / name).replace(self._staging / name)
        platform.sync_directory(self._staging)
        platform.sync_directory(self.path)

    def _remove_old(self, old: Iterable[str]) -> None:
        """Remove what the old receipt lists, and nothing else; what makes the old output loadable goes first.

        The receipt itself stays until a new one takes its place: should this run end before, OUT is still known.
        """
        first = [name for name in (INDEX_FILE, SINGLE_FILE) if name in old]
        self._remove(first)
        self._remove([name for name in old if name not in first])

    def _remove(self, names: list[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        platform.sync_directory(self.path)

    def _refuse_strangers(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise OutputError("exists and is not a directory", file=str(self.path), remedy=_ANOTHER_OUTPUT)
        if os.path.lexists(self._staging) and (self._staging.is_symlink() or not self._staging.is_dir()):
            what = f"holds something called {STAGING} that is not a directory of its own"
            raise OutputError(what, file=str(self.path), remedy=_ANOTHER_OUTPUT)  # clearing it would clear another
        others = sorted(entry.name for entry in self.path.iterdir() if entry.name != STAGING)
        if not others:
            return
        receipt = read_receipt(self.path)
        if receipt is None and RECEIPT in others:
            raise OutputError(
                f"holds a {RECEIPT} that cannot be read, or is damaged: so nobody knows what else there is ours",
                file=str(self.path),
                remedy="Let your user read it, or choose another output.",
            )
        if receipt is None:
            raise OutputError(
                f"exists, is not empty, and was not written by paramdelta: {printable(listed(others))}",
                file=str(self.path),
                remedy="Choose another output, or empty this directory yourself.",
            )
        died = self._staging.is_dir() and self._staging not in self._created
        if self._overwrite or is_abandoned(self.path, receipt, died=died):
            return
        same = receipt["fingerprint"] == self._plan.fingerprint
        damaged = [name for name, size in listed_files(receipt).items() if not _is_whole(self.path / name, size)]
        flaw = f", of which these files are gone or have another size: {printable(listed(damaged))}" if damaged else ""
        raise OutputError(
            f"holds the output of {'this very' if same else 'another'} merge{flaw}",
            file=str(self.path),
            remedy="Use --overwrite to replace it, or choose another output.",
        )

    def _refuse_occupied(self, ours: set[str]) -> None:
        """Refuse where a name is taken by anything but a file of an earlier merge."""
        for name in {*self._names, *ours}:
            target = self.path / name
            if (name not in ours and os.path.lexists(target)) or (target.is_dir() and not target.is_symlink()):
                raise OutputError(
                    f"holds something that paramdelta did not write, and would replace: {quoted(name)}",
                    file=str(self.path),
                    remedy="Move it elsewhere, or choose another output.",
                )

    def _space(self, old: Iterable[str]) -> tuple[int, int]:
        """Return the bytes that are still to be written, and those that are free once old files are gone."""
        wanted = sum(shard.size for shard in self.staging.missing()) + len(self._plan.layout.index or b"")
        wanted += sum(car.size for car in self._plan.sidecars)
        freed = 0
        for path in (*(self.path / name for name in old), *self.staging.leftovers()):
            with contextlib.suppress(FileNotFoundError):
                freed += path.lstat().st_size
        return wanted, freed

    def _refuse_small_files(self) -> None:
        """Try the largest shard's size on an empty file: FAT ends at 4 GiB, and says so only when it is reached."""
        largest = max(self.staging.missing(), key=lambda shard: shard.size, default=None)
        if largest is None or largest.size < _LARGE_FILE:
            return
        probe = self._staging / PROBE
        descriptor = platform.open_for_writing(str(probe))
        try:
            os.ftruncate(descriptor, largest.size)
        except OSError as error:
            raise output_refused(error, self.path / largest.name, largest.size) from error
        finally:
            os.close(descriptor)
            probe.unlink()

    def _check_sidecars(self) -> None:
        for car in self._plan.sidecars:
            check_identity(InputFile(str(car.source), car.identity, ""))

    def _clean_up(self) -> None:
        """Leave the staging directory, and remove directories that this run created and that are empty now."""
        self.staging.leave(published=self._published)
        for directory in reversed(self._created):
            with contextlib.suppress(OSError):
                directory.rmdir()


def begin_together(directories: Sequence[OutputDirectory]) -> None:
    """Do what `OutputDirectory.begin` does for several: nothing is removed or written unless all of them may begin.

    Raises as that does.
    """
    old = [directory._check() for directory in directories]
    disks: dict[int, list[int]] = {}
    for number, directory in enumerate(directories):
        with refusals(directory.path):
            disks.setdefault(directory.path.stat().st_dev, []).append(number)
    for numbers in disks.values():
        spaces = [directories[number]._space(old[number]) for number in numbers]
        _refuse_full_disk([directories[number].path for number in numbers], *map(sum, zip(*spaces, strict=True)))
    for directory, names in zip(directories, old, strict=True):
        directory._start(names)


def _refuse_full_disk(paths: Sequence[Path], wanted: int, freed: int) -> None:
    """Refuse outputs on one disk that has no room for them."""
    free = freed + min(map(free_space, paths))
    if free < wanted:
        several = len(paths) > 1
        raise OutputError(
            f"{f'the {len(paths)} outputs take' if several else 'the output takes'} {format_size(wanted)}"
            f" and the disk, or your quota, has {format_size(free)} free",
            file=str(paths[0].parent if several else paths[0]),
            remedy=f"Free some space, {'make fewer at once, ' if several else ''}or choose an output on another disk.",
        )


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _copy_durably(car: Sidecar, target: Path) -> str:
    """Copy a sidecar, or write what the output has instead; return the SHA-256 of what was written.

    Raises:
        CheckpointError: it cannot be read.
        InputChangedError: it is not what it was when the plan was made.
    """
    with open_file(car.source) as file:
        if file.identity != car.identity:
            raise InputChangedError("changed since the merge was planned", file=printable(str(car.source)))
        content = _chunks(file) if car.text is None else [car.text.encode()]
        digest = hashlib.sha256()
        _write_durably(target, _digested(content, digest))
    return digest.hexdigest()


def _digested(content: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    for chunk in content:
        digest.update(chunk)
        yield chunk


def _chunks(file: OpenFile) -> Iterator[bytes]:
    size = file.identity.size
    for begin in range(0, size, _CHUNK):
        yield file.read(min(_CHUNK, size - begin))


def _write_durably(path: Path, content: Iterable[bytes]) -> None:
    descriptor = platform.open_for_writing(str(path))
    try:
        offset = 0
        for chunk in content:
            platform.write_all(descriptor, memoryview(bytearray(chunk)), offset)  # some systems take writable ones only
            offset += len(chunk)
        platform.sync_file(descriptor)
    finally:
        os.close(descriptor)
