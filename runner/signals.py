"""TERM and INT ask for a stop: finish the step, save, leave with code 75. A second one leaves at once."""

import os
import signal
from types import FrameType

from runner.faults import Preempted

FATAL = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Remembers that somebody asked this process to stop; `check` is called where stopping is safe."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in FATAL:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(FATAL[signal.Signals(number)])
        self.received = signal.Signals(number)

    def check(self) -> None:
        """Raise Preempted once a stop was asked for."""
        if self.received is not None:
            raise Preempted(f"stopped by {self.received.name}; run the same command again to go on from here")
