"""Who has which turn at the processor: nobody gets ahead by coming often, or with many."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from server import Share, Turns
from waiting import LIMIT_S, wait_for


def have(turns: Turns, share: Share, seconds: float) -> None:
    """Have a turn that takes so much of the processor."""
    with turns.turn(share):
        end_s = time.thread_time() + seconds
        while time.thread_time() < end_s:
            pass


def test_others_have_their_turn_while_one_waits_for_something_else() -> None:
    turns, waiting = Turns(), Share()
    with turns.turn(waiting):
        with turns.aside(waiting):
            have(turns, Share(), 0.0)
        other = threading.Thread(target=have, args=(turns, Share(), 0.0), daemon=True)
        other.start()
        wait_for(lambda: turns._waiting, "which has its turn again")
    other.join(LIMIT_S)
    assert not other.is_alive()


def order_of(turns: Turns, waiting: Sequence[tuple[str, Share]]) -> list[str]:
    """Have all of these wait for one turn; return their names in the order of theirs."""
    order: list[str] = []

    def take(name: str, share: Share) -> None:
        with turns.turn(share):
            order.append(name)
            time.sleep(0)

    threads = []
    with turns.turn(Share()):
        for name, share in waiting:
            threads.append(threading.Thread(target=take, args=(name, share), daemon=True))
            threads[-1].start()
            wait_for(lambda: len(turns._waiting) == len(threads), "a thread that waits")
    for thread in threads:
        thread.join(LIMIT_S)
    return order


def test_who_had_less_is_first_and_otherwise_who_came_first() -> None:
    turns, greedy, modest = Turns(), Share(), Share()
    have(turns, greedy, 0.1)
    have(turns, modest, 0.02)
    waiting = [("greedy", greedy), ("modest", modest), ("new", Share()), ("newer", Share())]
    assert order_of(turns, waiting) == ["new", "newer", "modest", "greedy"]


def test_a_host_has_no_more_of_it_for_having_many_clients() -> None:
    turns, crowd, single = Turns(), Share(), Share()
    have(turns, Share(crowd), 0.1)
    have(turns, Share(single), 0.02)
    waiting = [(f"of many {number}", Share(crowd)) for number in range(3)]
    assert order_of(turns, [*waiting, ("single", Share(single))])[0] == "single"


def test_who_rests_makes_way_for_a_newcomer() -> None:
    turns, passed = Turns(), threading.Event()

    def come() -> None:
        have(turns, Share(), 0)
        passed.set()

    with turns.turn(Share()):
        threading.Thread(target=come, daemon=True).start()
        turns.rest(times=1e12)
        assert not passed.is_set(), "the turn was lost"
    assert passed.wait(LIMIT_S)
