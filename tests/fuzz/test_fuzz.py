"""A few thousand of the inputs that messages.py makes, and some of hypothesis's own."""

from __future__ import annotations

import random
from collections.abc import Iterator

import messages
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages import CONVERSATIONS, Target

INPUTS = 500
NAMES = list(CONVERSATIONS)


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Target]]:
    messages.record_tls()
    with messages.all_targets() as targets:
        yield targets


@pytest.mark.parametrize("name", NAMES)
def test_real_conversations_may_be_whole_or_cut_off_anywhere(
    name: str, targets: dict[str, Target]
) -> None:
    for parts in CONVERSATIONS[name]:
        whole = b"".join(map(messages.encode, parts))
        for end in range(0, len(whole) + 1, max(1, len(whole) // 300)):
            targets[name](whole[:end])


@pytest.mark.parametrize("name", NAMES)
def test_damaged_conversations_raise_nothing_unknown(name: str, targets: dict[str, Target]) -> None:
    dice = random.Random(name)
    for _ in range(INPUTS):
        targets[name](messages.make_input(name, dice))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_hypothesis_finds_raise_nothing_unknown(
    name: str, targets: dict[str, Target]
) -> None:
    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(
        data=st.one_of(
            st.binary(max_size=300),
            st.lists(
                st.dictionaries(st.sampled_from(["type", "entries", "error", "mode"]), VALUES)
            ).map(lambda parts: b"".join(map(messages.encode, parts))),
        )
    )
    def check(data: bytes) -> None:
        targets[name](data)

    check()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(NAMES),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children),
    max_leaves=15,
)
