"""A PipeWire that plays JACK may be restarted: whoever sends or plays sound goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import common
from pipewire import PipeWire
from sound import is_not_missed, port_of, start_client, start_server
from sound_card import VirtualSoundCard


@pytest.fixture
def pipewire() -> Iterator[PipeWire]:
    with PipeWire() as running:
        yield running


def test_who_uses_another_sound_system_does_not_notice(
    card: VirtualSoundCard, pipewire: PipeWire
) -> None:
    is_not_missed(card, pipewire.environment(card.environment), pipewire.kill)


def test_its_devices_are_waited_for(card: VirtualSoundCard, pipewire: PipeWire) -> None:
    environment = pipewire.environment(card.environment)
    with (
        start_server(environment, "--input", "room") as sender,
        start_client(environment, port_of(sender), "--output", "hall") as player,
    ):
        sender.wait_for("Broadcasting Room")
        player.wait_for("Listening")
        pipewire.kill()
        player.wait_for("the loudspeaker Hall is gone")
        sender.wait_for("the microphone Room is gone")
        pipewire.start()
        player.wait_for("the loudspeaker Hall is back")
        sender.wait_for("the microphone Room is back")
        assert player.interrupt() == common.EXIT_OK
        assert sender.interrupt() == common.EXIT_INTERRUPTED
