"""Memory of tensors stays with the process, and is given back when the process has grown by half: in processes that do so."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from runner.hoard import GROWTH, STATM

GROWS = """
import os
from runner.hoard import STATM, Hoard, keep_memory

def resident():
    return int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20

keep_memory()
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
print(usual, grown, given_back, resident())
"""


KEEPS = """
import resource, statistics, sys, torch
from runner.hoard import keep_memory

if sys.argv[1] == "kept":
    keep_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    kept = [torch.ones(size, 1000, 1000) for size in (1, 2, 10)]  # 4, 8 and 40 MB

def new_pages():
    before = faults()
    step()
    return faults() - before

print(statistics.median(new_pages() for _ in range(15)))
"""
ROOT = Path(__file__).parents[1]
GLIBC = STATM.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")
needs_glibc = pytest.mark.skipif(not GLIBC, reason="needs glibc on Linux")


def said(code: str, *words: str) -> list[int]:
    """The numbers that a process of its own prints."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return [int(float(word)) for word in done.stdout.split()]


@needs_glibc
def test_a_step_finds_the_pages_of_the_last_one() -> None:
    (kept,), (asked_anew,) = said(KEEPS, "kept"), said(KEEPS, "as it comes")
    assert kept < 5 < asked_anew  # 52 MB are 12,695 pages, or 26 large ones, at most steps


@needs_glibc
def test_a_process_gives_back_what_it_does_not_use() -> None:
    usual, grown, given_back, after = said(GROWS)
    assert grown > usual + 250
    assert given_back < usual + 50 < grown
    assert after <= given_back + 1
    assert usual * GROWTH < grown
