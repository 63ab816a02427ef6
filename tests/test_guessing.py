"""A guess at the pairing code takes a connection and a while, and leaves nothing to try at home."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from pathlib import Path

import pytest

import server
from common import (
    PAIRING,
    PROTOCOL,
    Connection,
    Hello,
    NotPaired,
    Pair,
    Pairing,
    PeerRefused,
    SocketPairError,
    Welcome,
    normalize_code,
)
from pairing import OTHER_CODE, check_paired, send_here
from support import HOST, Server, background, wait_for

ELSEWHERE = "127.0.0.2"
WRONG = normalize_code(OTHER_CODE)


def connect_from(host: str, port: int) -> Connection:
    """Connect from an address of this machine."""
    sock = socket.create_connection((HOST, port), timeout=60, source_address=(host, 0))
    return Connection(sock, "server")


def begin_guess(connection: Connection) -> None:
    """Send the server what it needs for a guess."""
    connection.send(Hello(PROTOCOL, PAIRING))
    connection.send(Pair(Pairing(WRONG, server_side=False).share))


def guess(host: str, port: int) -> None:
    """Try a wrong code as a real client does; raises what that raises."""
    with connect_from(host, port) as connection, connection.limit(60):
        connection.send(Hello(PROTOCOL, PAIRING))
        pairing = Pairing(WRONG, server_side=False)
        connection.send(Pair(pairing.share))
        context = pairing.finish(connection.receive(Pair).share)
        connection.start_tls(context, server_side=False)


def see_certificate(port: int) -> bytes:
    """Return the certificate that the server shows to who does not look whether it is right."""
    with connect_from(HOST, port) as connection, connection.limit(60):
        connection.send(Hello(PROTOCOL, PAIRING))
        pairing = Pairing(WRONG, server_side=False)
        connection.send(Pair(pairing.share))
        context = pairing.finish(connection.receive(Pair).share)
        context.verify_mode = ssl.CERT_NONE
        connection.start_tls(context, server_side=False)
        assert connection._tls is not None
        certificate = connection._tls._object.getpeercert(binary_form=True)
        assert certificate is not None
        with pytest.raises(SocketPairError):  # it has seen ours meanwhile
            connection.send(Hello(PROTOCOL, "file"))
            connection.read(1)
    return certificate


def test_what_a_guesser_sees_of_the_server_is_of_this_connection_alone(
    paired: Server, code: str, tmp_path: Path
) -> None:
    seen = {see_certificate(paired.port) for _ in range(3)}
    assert len(seen) == 3
    paired.wait_for_output("turned away: wrong pairing code")
    check_paired(paired, code, tmp_path)


def test_many_guesses_at_once_do_not_pass_the_limit(
    paired: Server, code: str, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        guessers = [stack.enter_context(connect_from(ELSEWHERE, paired.port)) for _ in range(200)]
        share = Pairing(WRONG, server_side=False).share
        began_s = time.monotonic()
        for each in guessers:
            each.send(Hello(PROTOCOL, PAIRING))
            each.send(Pair(share))
        answers = {"pair": 0, "wait": 0}
        for each in guessers:
            with contextlib.suppress(PeerRefused), each.limit(60):
                each.receive(Pair)
                answers["pair"] += 1
                continue
            answers["wait"] += 1
        # One that waits for its time, and those whose time has come meanwhile.
        late = 1 + (time.monotonic() - began_s) / server.GUESS_SPACING_S
        assert answers["pair"] <= server.FREE_GUESSES + 1 + late
        check_paired(paired, code, tmp_path)  # another address does not notice
    paired.wait_for_output("too many wrong pairing codes came from this address")


def test_many_right_codes_at_once_from_one_address_all_get_in(paired: Server, code: str) -> None:
    def get_in() -> bool:
        began_s = time.monotonic()
        try:
            let_in_at_once(paired.port, code)
        except SocketPairError:
            # Where the machine has stood still, those wait for too long that wait for others.
            if time.monotonic() - began_s < server.GUESS_SPACING_S:
                raise
            return False
        return True

    wait_for(get_in, "a try for which there was time")


def let_in_at_once(port: int, code: str) -> None:
    """Have many clients with the right code connect; raises what one of them raises."""
    with contextlib.ExitStack() as stack:
        pairings = []
        for _ in range(4 * server.FREE_GUESSES):
            connection = stack.enter_context(connect_from(ELSEWHERE, port))
            connection.send(Hello(PROTOCOL, PAIRING))
            pairings.append((connection, Pairing(code, server_side=False)))
            connection.send(Pair(pairings[-1][1].share))
        for connection, pairing in pairings:
            with connection.limit(60):
                context = pairing.finish(connection.receive(Pair).share)
                connection.start_tls(context, server_side=False)
                connection.send(Hello(PROTOCOL, "file"))
                connection.receive(Welcome)


def test_who_takes_the_servers_share_and_goes_has_guessed_as_well(paired: Server) -> None:
    def has_to_wait() -> bool:
        with connect_from(HOST, paired.port) as connection:
            begin_guess(connection)
            return not connection.wait_for_peer(0.5)

    for _ in range(server.FREE_GUESSES):
        with connect_from(HOST, paired.port) as connection:
            begin_guess(connection)
            connection.receive(Pair)
    paired.wait_for_output("did not prove that it has the pairing code")
    wait_for(has_to_wait)  # at once, but where that took so long that another is free


def test_the_right_code_gets_in_from_an_address_that_wrong_ones_came_from(
    paired: Server, code: str, source: Path
) -> None:
    for _ in range(server.FREE_GUESSES + 1):
        with pytest.raises(NotPaired):
            guess(HOST, paired.port)
    assert send_here(paired.port, source, code) == 0
    guess_again = pytest.raises(NotPaired)
    with guess_again:
        guess(HOST, paired.port)
    assert send_here(paired.port, source, code) == 0


def test_a_client_that_hangs_up_while_it_waits_for_a_guess_leaves_no_thread(paired: Server) -> None:
    held = paired.held()
    share = Pairing(WRONG, server_side=False).share
    with contextlib.ExitStack() as stack:
        guessers = [
            stack.enter_context(connect_from(ELSEWHERE, paired.port))
            for _ in range(server.FREE_GUESSES + 3)
        ]
        for each in guessers:  # all within seconds, also on a busy machine
            each.send(Hello(PROTOCOL, PAIRING))
            each.send(Pair(share))
    paired.wait_for_output("hung up while it waited to try a pairing code")
    paired.wait_until_idle(held)


def test_a_client_of_protocol_1_is_told_in_its_own_language(
    paired: Server, code: str, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with (
        connect_from(HOST, paired.port) as connection,
        pytest.raises(NotPaired, match="alert protocol version"),
    ):
        connection.start_tls(context, server_side=False)
    paired.wait_for_output("it speaks TLS: a browser, or an older version of Socket Pair")
    with connect_from(HOST, paired.port) as connection:
        connection.send(Hello(1, "file"))
        with pytest.raises(PeerRefused, match="speaks protocol 2, not 1: update the client"):
            connection.receive(Hello)
    check_paired(paired, code, tmp_path)


def test_guesses_beside_a_transfer_do_not_stop_it(
    paired: Server, code: str, tmp_path: Path
) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(50_000_000))

    def guess_for_ever() -> None:
        with contextlib.suppress(SocketPairError):
            guess(ELSEWHERE, paired.port)

    with background(guess_for_ever):
        assert send_here(paired.port, path, code) == 0
    assert (paired.folder / path.name).stat().st_size == path.stat().st_size
