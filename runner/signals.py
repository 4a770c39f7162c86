"""TERM and INT ask for a stop: finish the step, save, leave with code 75. A second one leaves at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from runner.faults import Preempted

FATAL = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Remembers that somebody asked this process to stop.

    Before training there is nothing to finish, and whatever takes long (importing, decoding) is broken off where it is.
    From `finish_steps` on, `check` is called where stopping is safe.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.last_words: Callable[[signal.Signals], None] | None = None  # said before a second signal leaves at once
        self._at_once = True
        for number in FATAL:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            self._leave(signal.Signals(number))
        self.received = signal.Signals(number)
        if self._at_once:
            self.check()

    def _leave(self, sent: signal.Signals) -> None:
        with suppress(Exception):
            if self.last_words is not None:
                self.last_words(sent)
        os._exit(FATAL[sent])

    def finish_steps(self) -> None:
        """From now on a stop waits for the next `check`."""
        self._at_once = False
        self.check()

    def check(self) -> None:
        """Raise Preempted once a stop was asked for."""
        if self.received is not None:
            raise _preempted(self.received)

    def blame(self, error: BaseException) -> BaseException:
        """The stop, where that broke something off: what was broken off may say something else, or be half done."""
        if self.received is None or not self._at_once or isinstance(error, Preempted):
            return error
        return _preempted(self.received)


@contextmanager
def interruptible() -> Iterator[None]:
    """TERM does what Ctrl-C does: who started other processes asks them to save, then ends."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _preempted(by: signal.Signals) -> Preempted:
    return Preempted(f"stopped by {by.name}; run the same command again to go on from here")
