"""Which microphone or loudspeaker a name, a number or nothing means, and what it is used as."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import common
import server
from common import Device
from sound import (
    MONO,
    Script,
    ends_with_one_line,
    hears_tone,
    is_tone,
    make_tone,
    port_of,
    start_client,
    start_server,
    write_wav,
)
from sound_card import ALSA_CONFIGURATION, VirtualSoundCard
from support import ROOT
from waiting import wait_for

if TYPE_CHECKING:
    from typing_extensions import Self

# "gone" is a device that PulseAudio does not have: opening it fails, though it is in the list.
# The last name is in Latin-1.
DEVICES = b"""\
pcm.usb { type null hint { show on description "-" } }
pcm."usb one" { type null hint { show on description "-" } }
pcm."usb two" { type null hint { show on description "-" } }
pcm.gone { type pulse device gone hint { show on description "-" } }
pcm.b\xe4d { type null hint { show on description "-" } }
"""


# What ALSA says each time that PortAudio has looked for its devices, on a machine without any.
ONE_LOOK = "Unknown PCM dmix"


@pytest.fixture(scope="module")
def many(card: VirtualSoundCard) -> Iterator[VirtualSoundCard]:
    """Give the virtual card on a machine with more devices."""
    configuration = card.folder / "asound.conf"
    configuration.write_bytes(ALSA_CONFIGURATION.encode() + DEVICES)
    yield card
    configuration.write_text(ALSA_CONFIGURATION)


def device(number: int, name: str, host_api: str = "ALSA") -> Device:
    return Device(number, name, host_api, channels=2, rate=48_000)


# --- by name --------------------------------------------------------------------------------


def test_an_exact_name_wins_over_a_part_of_anothers(many: VirtualSoundCard) -> None:
    with start_server(many, "--input", "usb") as sender:
        assert "Broadcasting usb, " in sender.text()


def test_a_part_of_several_names_is_an_error_that_lists_them(many: VirtualSoundCard) -> None:
    with Script("server.py", many, "--input", "USB ") as sender:
        ends_with_one_line(sender, "several", "usb one", "usb two")


def test_a_part_of_one_name_is_enough(many: VirtualSoundCard) -> None:
    with start_server(many, "--input", "B tw") as sender:
        assert "Broadcasting usb two, " in sender.text()


def test_a_name_that_is_not_utf_8_is_listed_and_can_be_used(many: VirtualSoundCard) -> None:
    with Script("server.py", many, "--list-devices") as listing:
        assert listing.end() == common.EXIT_OK
        assert r"b\udce4d" in listing.text()
    name = b"b\xe4d".decode("utf-8", "surrogateescape")
    with start_server(many, "--input", name) as sender:
        assert r"Broadcasting b\udce4d, " in sender.text()


@pytest.mark.parametrize(("script", "option"), [("server", "--input"), ("client", "--output")])
def test_an_empty_name_is_refused(card: VirtualSoundCard, script: str, option: str) -> None:
    with Script(f"{script}.py", card, option, " ") as refused:
        assert refused.end() == common.EXIT_USAGE
        assert "empty name" in refused.lines[-1]


def test_a_device_that_cannot_be_opened_is_a_line(many: VirtualSoundCard) -> None:
    with Script("server.py", many, "--input", "gone") as sender:
        ends_with_one_line(sender, "'gone' cannot be opened", "another program", "--input")


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        ("Mic", [1]),
        ("mic", [1]),
        ("MIC", [6]),
        ("2", [2]),
        ("mic (hw:7", [2]),
        ("7", []),
        ("MIC (", [2, 3]),
        ("array", [4]),  # Windows shows one device by several sound systems
        ("none of them", []),
    ],
)
def test_a_wanted_name_means_the_exact_one_or_a_number_else_a_part(
    wanted: str, numbers: list[int]
) -> None:
    devices = [
        device(1, "Mic"),
        device(2, "Mic (hw:7,0)"),
        device(3, "Mic (hw:8,0)"),
        device(4, "Microphone Array", "MME"),
        device(5, "Microphone Array (long name)", "WASAPI"),
        device(6, "MIC"),
    ]
    assert [found.number for found in common.meant_devices(wanted, devices)] == numbers


def test_a_device_is_known_again_by_its_name_and_its_sound_system() -> None:
    others = [device(1, "Mic", "JACK"), device(1, "Mic 2"), device(5, "Mic"), device(6, "Mic")]
    assert device(1, "Mic").among(others) == others[2]
    assert device(6, "Mic").among(others) == others[3]
    assert device(1, "Microphone").among(others) is None


def test_pulse_source_chooses_the_microphone_behind_the_default(card: VirtualSoundCard) -> None:
    environment = {**card.environment, "PULSE_SOURCE": "speaker.monitor"}
    with Script("server.py", environment, "--port", "0") as sender:
        sender.wait_for("Broadcasting default")
        sources = dict(
            line.split()[1::-1] for line in card.pactl("list", "short", "sources").splitlines()
        )
        wait_for(
            lambda: (
                sources["speaker.monitor"]
                in [
                    line.split()[1]
                    for line in card.pactl("list", "short", "source-outputs").splitlines()
                ]
            ),
            "the use of that source",
        )


@pytest.mark.parametrize("away_s", [-0.01, 1e5])
@pytest.mark.parametrize("direction", [common.MICROPHONE, common.SPEAKER])
def test_what_cannot_be_the_delay_of_a_card_is_not_told_as_one(
    direction: common.Direction, away_s: float
) -> None:
    def times(away_s: float) -> dict[str, float]:
        names = {"input_buffer_adc_time": -away_s, "output_buffer_dac_time": away_s}
        return {"current_time": 1e5, **{name: 1e5 + ahead_s for name, ahead_s in names.items()}}

    assert direction.seconds_away(times(0.02)) == pytest.approx(0.02)
    assert direction.seconds_away(times(away_s)) == 0.0


def test_where_no_other_process_can_be_started_there_is_no_jack() -> None:
    # In a process of its own, as JACK is then hidden from all of it.
    program = (
        "import sys, common; sys.executable = '/nowhere/python';"
        "print(common.find_jack_devices(common.SPEAKER, []))"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# --- while it is used -----------------------------------------------------------------------


def test_no_other_card_is_taken_for_one_that_is_lost(card: VirtualSoundCard) -> None:
    configuration = card.folder / "asound.conf"
    name = "room"
    first = f'pcm."{name}" {{ type pulse hint {{ show on description "-" }} }}\n'
    other = f'pcm."{name} of another" {{ type pulse hint {{ show on description "-" }} }}\n'
    configuration.write_text(ALSA_CONFIGURATION + first + other)
    try:
        with start_server(card, "--input", name, "-v") as sender:
            # Not while PortAudio looks: it aborts where a device comes or goes meanwhile.
            configuration.write_text(ALSA_CONFIGURATION + other)
            card.unplug()
            sender.wait_for("the microphone room is gone")
            card.plug_in()
            looks = sender.text().count(ONE_LOOK)
            sender.wait_for(ONE_LOOK, times=looks + 3)  # at which it could take the other one
            assert "is back" not in sender.text()
            configuration.write_text(ALSA_CONFIGURATION + first + other)
            sender.wait_for("the microphone room is back")
    finally:
        configuration.write_text(ALSA_CONFIGURATION)


def test_a_card_is_back_once_when_sound_flows_again(card: VirtualSoundCard) -> None:
    with start_server(card) as sender:
        card.pactl("suspend-source", "mic", "1")
        card.pactl("suspend-sink", "micfeed", "1")
        sender.wait_for("is gone")
        first = last_use_of_microphone(card)
        wait_for(lambda: last_use_of_microphone(card) > first, "it is opened")
        second = last_use_of_microphone(card)
        wait_for(lambda: last_use_of_microphone(card) > second, "it is opened again")
        assert "is back" not in sender.text()
        card.pactl("suspend-sink", "micfeed", "0")
        card.pactl("suspend-source", "mic", "0")
        sender.wait_for("is back")
        assert sender.text().count("is gone") == sender.text().count("is back") == 1


def test_a_process_that_stood_still_has_lost_no_card(card: VirtualSoundCard) -> None:
    with start_server(card) as sender, start_client(card, port_of(sender)) as player:
        assert hears_tone(card)
        for script in (sender, player):
            script.signal(signal.SIGSTOP)
        time.sleep(common.CARD_TIMEOUT_S + 1)
        for script in (sender, player):
            script.signal(signal.SIGCONT)
        assert hears_tone(card)
        assert "is gone" not in sender.text() + player.text()


class FlakyCard:
    """In the place of PortAudio and of a stream: its cable comes off and on in made-up time."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.is_active = lambda: False
        self.settings: common.StreamSettings | None = None

    def open(self, _: Device, settings: common.StreamSettings) -> Self:
        """As PortAudio opens a stream."""
        self.settings = settings
        return self

    def close(self) -> None:
        """As a stream and as PortAudio."""

    def give_block(self) -> None:
        """Have 3 ms of sound captured."""
        self.now_s += 0.003
        assert self.settings is not None
        self.settings.exchange(bytes(288), common.BlockInfo(144, 0.0, is_after_gap=False))


def test_a_microphone_that_is_back_for_a_moment_and_gone_again_is_timed_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flaky = FlakyCard()
    monkeypatch.setattr(common, "clock_s", lambda: flaky.now_s)
    monkeypatch.setattr(common, "find_device", lambda *_: (flaky, device(0, "flaky")))
    monkeypatch.setattr(common, "SoundSystem", lambda _: flaky)
    monkeypatch.setattr(common.SoundCard, "_watch", lambda _: None)  # here the test looks
    captured = server.CaptureQueue(MONO)

    def hand_over(samples: bytes | None, info: common.BlockInfo) -> None:
        captured.skip(info.lost_s)
        captured.put(samples or b"")

    card = common.SoundCard(common.MICROPHONE, None, print)
    card.open(common.StreamSettings(MONO, 3.0, hand_over))
    for _ in range(3):
        flaky.give_block()
        card._look_after()
        flaky.now_s += 60.0
    flaky.give_block()
    for number in range(4):
        block = captured.take(0)
        assert block is not None
        assert block.first_frame / MONO.rate == pytest.approx(number * 60.0, abs=0.02)


def last_use_of_microphone(card: VirtualSoundCard) -> int:
    """Return a number that grows with each time that one is opened, 0 while none is open."""
    uses = card.pactl("list", "short", "source-outputs").splitlines()
    return max((int(line.split()[0]) for line in uses), default=0)


def test_a_lost_loudspeaker_plays_what_comes_in_another_format_once_it_is_back(
    card: VirtualSoundCard, tmp_path: Path
) -> None:
    mono, stereo = tmp_path / "mono.wav", tmp_path / "stereo.wav"
    write_wav(mono, make_tone(1), MONO)
    write_wav(stereo, server.double_channel(make_tone(1)), common.AudioFormat(48_000, 2))
    with contextlib.ExitStack() as scripts:
        sender = scripts.enter_context(start_server(card, "--input", str(mono)))
        port = port_of(sender)
        player = scripts.enter_context(start_client(card, port))
        player.wait_for("Listening")
        card.unplug()
        player.wait_for("is gone")
        sender.kill()
        scripts.enter_context(start_server(card, "--port", port, "--input", str(stereo)))
        player.wait_for("48000 Hz stereo")
        card.plug_in()
        player.wait_for("is back")
        with card.record() as said:
            wait_for(lambda: is_tone(said.tail(0.1)), "the tone at the loudspeaker")


def test_ctrl_c_ends_also_where_the_sound_system_hangs(card: VirtualSoundCard) -> None:
    with start_server(card) as sender, card.hanging():
        sender.wait_for("is gone")
        assert sender.interrupt() == common.EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, common.EXIT_INTERRUPTED), (signal.SIGTERM, common.EXIT_TERMINATED)],
)
@pytest.mark.parametrize("arguments", [("server.py",), ("client.py", "--list-devices")])
def test_a_signal_while_the_sound_system_starts_ends(
    card: VirtualSoundCard, arguments: tuple[str, ...], number: signal.Signals, status: int
) -> None:
    with card.hanging(), Script(arguments[0], card, *arguments[1:]) as script:
        maps = Path(f"/proc/{script.popen.pid}/maps")
        wait_for(lambda: "libpulse" in maps.read_text(), "the use of PulseAudio")
        script.signal(number)
        assert script.end() == status
        assert script.lines == []


# --- silence --------------------------------------------------------------------------------


def test_the_silence_of_a_muted_microphone_is_a_line(card: VirtualSoundCard) -> None:
    with start_server(card) as sender:
        sender.wait_for("nothing but zeros for 10 s")
