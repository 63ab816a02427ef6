"""Who has which turn at the processor: nobody gets ahead by coming often, or with many."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from server import Turns, Who
from waiting import LIMIT_S, wait_for


def have(turns: Turns, who: Who, seconds: float) -> None:
    """Have a turn that takes so much of the processor."""
    with turns.turn(who):
        end_s = time.thread_time() + seconds
        while time.thread_time() < end_s:
            pass


def test_others_have_their_turn_while_one_waits_for_something_else() -> None:
    turns, waiting = Turns(), ("waiting",)
    with turns.turn(waiting):
        with turns.released(waiting):
            have(turns, ("other",), 0.0)
        other = threading.Thread(target=have, args=(turns, ("other",), 0.0), daemon=True)
        other.start()
        wait_for(lambda: turns._waiting, "which has its turn again")
    other.join(LIMIT_S)
    assert not other.is_alive()


def order_of(turns: Turns, waiting: Sequence[tuple[str, Who]]) -> list[str]:
    """Have all of these wait for one turn; return their names in the order of theirs."""
    order: list[str] = []

    def take(name: str, who: Who) -> None:
        with turns.turn(who):
            order.append(name)
            time.sleep(0)

    threads = []
    with turns.turn(("somebody",)):
        for name, who in waiting:
            threads.append(threading.Thread(target=take, args=(name, who), daemon=True))
            threads[-1].start()
            wait_for(lambda: len(turns._waiting) == len(threads), "a thread that waits")
    for thread in threads:
        thread.join(LIMIT_S)
    return order


def test_who_had_less_is_first_and_otherwise_who_came_first() -> None:
    turns = Turns()
    have(turns, ("modest",), 0.02)
    have(turns, ("greedy",), 0.1)
    order = order_of(turns, [(name, (name,)) for name in ("greedy", "modest", "new", "newer")])
    assert order.index("modest") < order.index("greedy")
    assert order.index("new") < order.index("newer")


def test_who_is_due_waits_for_no_newcomers() -> None:
    turns = Turns()
    have(turns, ("host", "old"), 0.0)
    wait_for(lambda: time.monotonic() > turns._due_s.find("old", 0.0), "who is due again")
    waiting: list[tuple[str, Who]] = [
        ("new host", ("other", "new")),
        ("new client", ("host", "new")),
        ("old", ("host", "old")),
    ]
    assert order_of(turns, waiting) == ["old", "new host", "new client"]


def test_a_host_has_no_more_of_it_for_having_many_clients() -> None:
    turns = Turns()
    have(turns, ("single", 0), 0.02)
    have(turns, ("crowd", 0), 0.1)
    waiting = [(f"of many {number}", ("crowd", number)) for number in range(1, 4)]
    assert order_of(turns, [*waiting, ("single", ("single", 0))])[0] == "single"
