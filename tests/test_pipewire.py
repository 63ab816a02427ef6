"""A PipeWire that plays JACK may be restarted: whoever sends or plays sound goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import common
from pipewire import PipeWire
from sound import Script, are_lost_and_found, port_of
from sound_card import VirtualSoundCard


@pytest.fixture
def pipewire() -> Iterator[PipeWire]:
    with PipeWire() as running:
        yield running


def test_who_uses_another_sound_system_does_not_notice(
    card: VirtualSoundCard, pipewire: PipeWire
) -> None:
    environment = pipewire.environment(card.environment)
    with Script("server.py", "--port", "0", environment=environment) as sender:
        sender.wait_for("Ctrl+C to stop")
        arguments = ("--port", port_of(sender))
        with Script("client.py", *arguments, environment=environment) as player:
            player.wait_for("Listening")
            pipewire.kill()
            are_lost_and_found(card, player, sender)  # PortAudio is started anew
            assert player.interrupt() == common.EXIT_OK
        assert sender.interrupt() == common.EXIT_INTERRUPTED


def test_its_devices_are_waited_for(card: VirtualSoundCard, pipewire: PipeWire) -> None:
    environment = pipewire.environment(card.environment)
    with Script("server.py", "--port", "0", "--input", "room", environment=environment) as sender:
        sender.wait_for("Broadcasting Room")
        arguments = ("--port", port_of(sender), "--output", "hall")
        with Script("client.py", *arguments, environment=environment) as player:
            player.wait_for("Listening")
            pipewire.kill()
            player.wait_for("the loudspeaker Hall is gone")
            sender.wait_for("the microphone Room is gone")
            pipewire.start()
            player.wait_for("the loudspeaker Hall is back")
            sender.wait_for("the microphone Room is back")
            assert player.interrupt() == common.EXIT_OK
        assert sender.interrupt() == common.EXIT_INTERRUPTED
