"""A thread that runs an iterator a few items ahead of its consumer."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Generic, TypeVar

T = TypeVar("T")


class _Channel(Generic[T]):
    """A bounded queue that either side can close, without polling."""

    def __init__(self, depth: int) -> None:
        self._items: deque[T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Waits for room; False when the consumer is gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def get(self) -> T:
        """Waits for an item; StopIteration after the last one, or the producer's exception."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._ended or self._closed)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            raise StopIteration

    def end(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _produce(make: Callable[[], Generator[T]], channel: _Channel[T]) -> None:
    # Knows the channel only, never the Prefetcher: else a forgotten Prefetcher would be kept alive by its own thread.
    try:
        with closing(make()) as items:
            for item in items:
                if not channel.put(item):
                    return
    except BaseException as error:  # whatever it is belongs to the consumer
        channel.end(error)
    else:
        channel.end()


def _stop(channel: _Channel[T], thread: threading.Thread) -> None:
    channel.close()
    if thread is not threading.current_thread():
        thread.join()


class Prefetcher(Iterator[T]):
    """Iterates `make()` in a thread, at most `depth` items ahead.

    An exception in the thread is raised here, with its own type, after the items before it. `close()`, the end of a
    `with` block, garbage collection and the end of the program all stop the thread and wait for it.
    """

    def __init__(self, make: Callable[[], Generator[T]], depth: int) -> None:
        self.waited_s = 0.0
        """Seconds that the consumer spent waiting in `next`"""
        self._channel: _Channel[T] = _Channel(max(1, depth))
        thread = threading.Thread(target=_produce, args=(make, self._channel), name="sparsepilot-prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._channel, thread)
        thread.start()

    def __next__(self) -> T:
        began = time.perf_counter()
        try:
            return self._channel.get()
        finally:
            self.waited_s += time.perf_counter() - began

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread and drops what it had read; safe to call again."""
        self._finalizer()
