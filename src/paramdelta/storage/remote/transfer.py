"""Bytes from a service into memory: requests are repeated until all is there, or nothing helps any more.

Requests run in the thread of fsspec's event loop; whoever needs their bytes waits in a thread of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from typing import TYPE_CHECKING, Final, TypeVar

import fsspec.asyn

from paramdelta.errors import FetchError
from paramdelta.storage.remote.retries import TransientError
from paramdelta.storage.remote.stopping import stop_if_ended

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
    from typing import Any

    from paramdelta.storage.remote.retries import Patience
    from paramdelta.storage.remote.service import Range, Service

_T = TypeVar("_T")

_AT_ONCE: Final = 32
_POLL_SECONDS: Final = 0.2


def start(work: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
    """Begin work in the loop's thread."""
    return asyncio.run_coroutine_threadsafe(work, fsspec.asyn.get_loop())


def wait(future: concurrent.futures.Future[_T]) -> _T:
    """Return what work comes to. Ctrl-C, and what `stopping` watches, end the wait and the work."""
    try:
        while not concurrent.futures.wait([future], timeout=_POLL_SECONDS).done:
            stop_if_ended()
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def repeat(patience: Patience, address: str, ask: Callable[[], Awaitable[_T]]) -> _T:
    """Return what a question comes to, asked again as long as it may go better.

    Raises:
        FetchError: it went wrong too often; and what the question raises, TransientError apart.
    """
    tried = 0
    while True:
        try:
            async with asyncio.timeout(patience.stall):
                return await ask()
        except TimeoutError:
            failure = TransientError(f"no answer came for {patience.stall:g} s")
        except TransientError as error:
            failure = error
        tried += 1
        if tried >= patience.asking:
            raise _given_up(address, failure, tried, "Check the network, and that the address is right.")
        await asyncio.sleep(patience.wait(tried, failure.wait))


def _given_up(address: str, failure: TransientError, tried: int, remedy: str) -> FetchError:
    return FetchError(
        f"cannot be fetched: {failure.reason}, {tried} times in a row",
        file=address,
        remedy=remedy,
    )


async def receive_all(service: Service, ranges: Sequence[Range], memories: Sequence[memoryview]) -> None:
    """Fill each memory with its range, several at once. Raises as `receive`."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(wanted: Range, memory: memoryview) -> None:
        async with gate:
            await receive(service, wanted, memory)

    async with _tasks() as tasks:
        tasks += [asyncio.ensure_future(one(*each)) for each in zip(ranges, memories, strict=True)]
        await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def _tasks() -> AsyncIterator[list[asyncio.Future[Any]]]:
    """Let no task outlive what needs it."""
    tasks: list[asyncio.Future[Any]] = []
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


async def receive(service: Service, wanted: Range, memory: memoryview) -> None:
    """Fill the first bytes of ``memory`` with a range.

    What a broken connection has brought is kept, and only the rest asked for again. A request that brings nothing is
    repeated after a wait, as the service's patience has it.

    Raises:
        FetchError: it cannot be had.
        InputChangedError: the file is another one now.
    """
    patience = service.patience
    done = tried = 0
    while done < wanted.size:
        before = done
        rest = wanted._replace(begin=wanted.begin + done, size=wanted.size - done)
        try:
            done += await _one_request(service, rest, memory[done : wanted.size], patience.stall)
            continue
        except _StoppedError as stopped:
            done += stopped.received
            failure = stopped.failure
        tried = 0 if done > before else tried + 1
        if tried >= patience.tries:
            raise _given_up(wanted.address, failure, tried, "Check the network, then repeat the command.")
        await asyncio.sleep(patience.wait(tried, failure.wait))


class _StoppedError(Exception):
    """A request that ended early: how many bytes it brought, and why it ended."""

    def __init__(self, received: int, failure: TransientError) -> None:
        super().__init__(failure.reason)
        self.received = received
        self.failure = failure


async def _one_request(service: Service, wanted: Range, memory: memoryview, stall: float) -> int:
    """Return how many bytes one request has brought: all. Raises _StoppedError where it has not brought all."""
    done = 0
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(stall) as limit, contextlib.aclosing(service.stream(wanted)) as chunks:
            async for chunk in chunks:
                if done + len(chunk) > wanted.size:
                    raise FetchError("the server sends more bytes than it was asked for", file=wanted.address)
                memory[done : done + len(chunk)] = chunk
                done += len(chunk)
                limit.reschedule(clock() + stall)
    except TimeoutError:
        raise _StoppedError(done, TransientError(f"no byte came for {stall:g} s")) from None
    except TransientError as failure:
        raise _StoppedError(done, failure) from failure
    if done < wanted.size:
        raise _StoppedError(done, TransientError("the answer ended early"))
    return done
