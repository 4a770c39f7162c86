"""Memory that the C library keeps is given back when the process has grown by half, in a process that has really grown."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from runner.hoard import STATM

GROWS = """
import os
from runner.hoard import GROWTH, STATM, Hoard

def resident():
    return int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20

hoard = Hoard()
hoard.after_step()
usual = resident()
blocks = [bytearray(100_000 if even else 2_000) for _ in range(3_000) for even in (True, False)]
pins = blocks[1::2]  # small ones that stay, so that nothing can be cut off at the end of the heap
del blocks
grown = resident()
hoard.after_step()
given_back = resident()
hoard.after_step()
print(usual, grown, given_back, resident(), GROWTH)
"""


@pytest.mark.skipif(not (STATM.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")), reason="needs glibc on Linux")
def test_a_process_gives_back_what_it_does_not_use() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", GROWS], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    usual, grown, given_back, after, growth = map(float, done.stdout.split())
    assert grown > usual + 250
    assert given_back < usual + 50 < grown
    assert after <= given_back + 1
    assert growth * usual < grown
