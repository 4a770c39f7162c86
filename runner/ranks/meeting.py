"""Where the ranks of one round find one another.

torchrun keeps one store for all its rounds (https://github.com/pytorch/pytorch/issues/135712): after a restart a rank may read
there the address of a process that is dead, and agents of several hosts count restarts each for itself. So every round agrees
on a part of the store that nobody has written to. The other ranks call the first one under names of their own; it answers
each name that is new, and a name that a dead process left there gets an answer that nobody reads.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from runner.faults import Exit, RunnerError
from runner.ranks.place import Place

LIMIT = 300.0  # seconds in which all ranks have to come
LOOK_EVERY = 0.05  # seconds


class RankLost(RunnerError):
    """Another rank is gone or hangs; the folder is whole, and the same command goes on from its last checkpoint."""

    code = Exit.PREEMPTED


@dataclass(frozen=True)
class Meeting:
    """What all ranks of a round know: their store, and host and pid of each of them."""

    store: Store
    processes: tuple[tuple[str, int], ...]

    @property
    def siblings(self) -> list[int]:
        """The other ranks on this host."""
        return [pid for host, pid in self.processes if host == socket.gethostname() and pid != os.getpid()]


def meet(place: Place) -> Meeting:
    """Wait for all ranks. Raises RankLost where one does not come."""
    patience = timedelta(seconds=LIMIT)
    store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=patience))
    shared = PrefixStore("lowbit", store)
    chosen = _choose(shared, place.size) if place.first else _ask(shared, place.rank)
    own = PrefixStore(next(chosen), shared)
    own.set(f"here/{place.rank}", json.dumps([socket.gethostname(), os.getpid()]))
    here = [f"here/{rank}" for rank in range(place.size)]

    def all_here() -> bool:
        next(chosen)
        return bool(own.check(here))

    _until(all_here, f"not all of {place.size} ranks")
    return Meeting(own, tuple((host, int(pid)) for host, pid in (json.loads(own.get(key)) for key in here)))


def _choose(store: Store, size: int) -> Iterator[str]:
    """The first rank's part: a name for the round, told, at every look, to whoever has called since the last one."""
    name, answered = uuid4().hex, set[str]()
    while True:
        for rank in range(1, size):
            caller = store.get(f"call/{rank}").decode() if store.check([f"call/{rank}"]) else ""
            if caller and caller not in answered:
                store.set(f"answer/{caller}", name)
                answered.add(caller)
        yield name


def _ask(store: Store, rank: int) -> Iterator[str]:
    """The part of the others: call, and wait for the name."""
    caller = uuid4().hex
    store.set(f"call/{rank}", caller)
    _until(lambda: store.check([f"answer/{caller}"]), "the first rank did not answer")
    name = store.get(f"answer/{caller}").decode()
    while True:
        yield name


def _until(true: Callable[[], bool], otherwise: str) -> None:
    """Look again and again, so that a signal is answered in between."""
    deadline = time.monotonic() + LIMIT
    while not true():
        if time.monotonic() > deadline:
            raise RankLost(f"{otherwise} within {LIMIT:.0f} s; run the same command again to go on")
        time.sleep(LOOK_EVERY)
