"""Turns: everybody equally often, in both directions, and ratios that are taken within a round."""

import time

import pytest

from runner.bench.timing import Spread, ratio, take_turns


def test_every_action_gets_its_turns_and_neighbours_change() -> None:
    order: list[str] = []
    actions = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    rounds: list[int] = []
    times = take_turns(actions, turns=4, warmup=1, after_round=rounds.append)
    assert order[3:] == [*"abc", *"cba", *"abc", *"cba"]
    assert rounds == [1, 2, 3, 4]
    assert all(len(t.wall) == len(t.cpu) == 4 for t in times.values())


def test_waiting_costs_time_on_the_clock_and_none_of_the_processor() -> None:
    times = take_turns({"wait": lambda: time.sleep(0.03), "work": lambda: _spin(0.03)}, turns=3, warmup=1)
    assert min(times["wait"].wall) >= 0.03
    assert max(times["wait"].cpu) < 0.02 < 0.029 < min(times["work"].cpu)


def test_short_actions_are_repeated_within_a_turn() -> None:
    calls = 0

    def short() -> None:
        nonlocal calls
        calls += 1
        _spin(0.001)

    times = take_turns({"short": short}, turns=2, warmup=1, shortest=0.02)
    assert calls > 15
    assert all(0.001 <= seconds < 0.01 for seconds in times["short"].cpu)


def test_a_ratio_is_taken_turn_by_turn() -> None:
    found = ratio([1.0, 20.0, 300.0], [1.0, 10.0, 100.0])
    assert found == Spread(median=2.0, low=1.5, high=2.5)
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def _spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
