"""Give memory back that the C library keeps for later and never uses again.

Tensors of many sizes, codes beside floats, leave holes between blocks that glibc cannot fill: the process grows from step to step
(W4A4 ResNet-18, batch 128: by 0.1 GB a step, 8 GB after 50), although no tensor is kept. To give it all back after every
step would cost the pages that the next step needs at once; so it is given back when the process has grown by half.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

STATM = Path("/proc/self/statm")
GROWTH = 1.5


class Hoard:
    """What the C library keeps of this process. Does nothing where that is not glibc on Linux."""

    def __init__(self) -> None:
        self._usual: int | None = None
        self._give_back: Callable[[int], int] | None
        try:
            self._give_back = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError):
            self._give_back = None

    def after_step(self) -> None:
        """The process after its first step is what it should be; later ones may be half as large again."""
        if self._give_back is None or not STATM.exists():
            return
        now = int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")
        if self._usual is None:
            self._usual = now
        elif now > GROWTH * self._usual:
            self._give_back(0)
