"""What both scripts ask for, at a terminal and through pipes, and the arguments that answer it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from client import split_words
from pairing import CODE, OTHER_CODE
from processes import CTRL_C
from support import (
    MIB,
    FakeServer,
    Process,
    Server,
    contents,
    free_port,
    linux,
    make_file,
    run_script,
    sha256,
)

# --- the prompts ----------------------------------------------------------------------------


def test_the_classic_session_in_two_terminals(tmp_path: Path) -> None:
    source = make_file(tmp_path / "report.pdf", 3 * MIB)
    with Process("server.py", "--port", "0", cwd=tmp_path, terminal=True) as server:
        server.expect(r"Mode \(file/audio\): ")
        server.type("file\n")
        listening = r"Receiving into received/ on 127\.0\.0\.1:(\d+) - Ctrl\+C to stop\r\n"
        port = server.expect(listening)[1]
        with Process("client.py", "--port", port, cwd=tmp_path, terminal=True) as client:
            client.expect(r"Mode \(file/audio\): ")
            client.type("file\n")
            client.expect("File name: ")
            client.type("report.pdf\n")
            client.expect(r"report\.pdf: 100%.*3\.\d*M/3\.\d*M")
            saved = client.expect(r"Saved as report\.pdf, SHA-256 matches \((\w{8})\.\.\.\)\r\n")
            assert saved[1] == sha256(source)[:8]
            assert client.wait().status == 0
            assert client.rest() == ""
        server.expect(r"saved as received/report\.pdf")
        server.type(CTRL_C)
        assert server.wait().status == 130
    assert (tmp_path / "received" / "report.pdf").read_bytes() == source.read_bytes()


def test_the_classic_session_through_pipes(tmp_path: Path) -> None:
    source = make_file(tmp_path / "report.pdf", 1000)
    with Process("server.py", "--port", "0", stdin=b"file\n", cwd=tmp_path) as server:
        port = server.wait_for_output(r"on 127\.0\.0\.1:(\d+) - Ctrl\+C to stop\n")[1]
        assert server.stdout().splitlines() == [
            "Mode (file/audio): file",
            f"Receiving into received/ on 127.0.0.1:{port} - Ctrl+C to stop",
        ]
        result = run_script("client.py", "--port", port, stdin=b"file\nreport.pdf\n", cwd=tmp_path)
    assert result.status == 0
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "Mode (file/audio): file",
        "File name: report.pdf",
        f"Saved as report.pdf, SHA-256 matches ({sha256(source)[:8]}...)",
    ]
    assert (tmp_path / "received" / "report.pdf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_an_unknown_mode_is_asked_for_again(script: str, tmp_path: Path) -> None:
    result = run_script(script, stdin=b"files\n\nvideo\n", cwd=tmp_path)
    assert result.status == 1
    assert result.stdout.count("Mode (file/audio): ") == 4
    assert result.stdout.count("please type file or audio") == 3


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_the_mode_may_be_typed_in_capitals_and_with_blanks(script: str, tmp_path: Path) -> None:
    with FakeServer(b"") as other:  # which ends both: its port is taken, and it is no server
        result = run_script(script, f"--port={other.port}", stdin=b" File \nx\n", cwd=tmp_path)
    assert result.stdout.count("Mode (file/audio): ") == 1
    assert "please type" not in result.stdout


@pytest.mark.parametrize(
    ("script", "args"),
    [("server.py", ()), ("client.py", ()), ("client.py", ("file",))],
)
def test_end_of_input_at_a_prompt_ends_with_one_line(
    server: Server, script: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    result = run_script(script, *args, f"--port={server.port}", cwd=tmp_path)
    assert result.status == 1
    assert [line for line in result.error_lines if line] == [
        line for line in result.error_lines if "end of input" in line
    ]
    assert "end of input" in result.stderr


def test_ctrl_c_at_a_prompt_is_no_error_message(tmp_path: Path) -> None:
    for script in ("server.py", "client.py"):
        with Process(script, cwd=tmp_path, terminal=True) as terminal:
            terminal.expect(r"Mode \(file/audio\): ")
            terminal.type(CTRL_C)
            result = terminal.wait()
        assert result.status == 130
        assert "Traceback" not in result.stdout


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("plain.txt", "  plain.txt  "),
        ("a file.txt", "'a file.txt'"),
        ("a file.txt", '"a file.txt"'),
        ("a file.txt", "a file.txt"),
        ("a file.txt", r"a\ file.txt"),
        ("it's here.txt", r"'it'\''s here.txt' "),
        ("home.txt", "~/home.txt"),
        ("home.txt", "'~/home.txt'"),
        ("'quoted'", "'quoted'"),
        ('12"', ' 12" '),
        ("back\\slash", "back\\slash"),
        (" blank", " blank"),
        ("café.txt", "café.txt"),
    ],
)
def test_the_file_prompt_takes_names_as_people_write_them(
    server: Server, tmp_path: Path, name: str, typed: str
) -> None:
    source = make_file(tmp_path / "home" / name, 100)
    result = run_script(
        "client.py",
        "file",
        "--port",
        str(server.port),
        stdin=f"\n{typed}\n".encode(),
        cwd=source.parent,
        env={"HOME": str(source.parent), "USERPROFILE": str(source.parent)},
    )
    assert result.status == 0, result
    assert result.stdout.startswith("File name: \nFile name: "), "an empty answer is asked again"
    assert contents(server.folder) == {name: source.read_bytes()}


@linux
def test_several_files_that_are_dragged_to_the_prompt_are_sent(
    server: Server, tmp_path: Path
) -> None:
    for name in ("a file.txt", "another"):
        make_file(tmp_path / name, 100)
    typed = b"'a file.txt' 'another' \n"
    result = run_script("client.py", "file", f"--port={server.port}", stdin=typed, cwd=tmp_path)
    assert result.status == 0, result
    assert set(contents(server.folder)) == {"a file.txt", "another"}


@linux
def test_standard_input_is_not_sent_where_it_has_the_answers_also_beside_a_file(
    server: Server, tmp_path: Path
) -> None:
    for name in ("-", "report.pdf"):
        make_file(tmp_path / name, 100)
    typed = b"'-' report.pdf\n./- report.pdf\n"
    result = run_script("client.py", "file", f"--port={server.port}", stdin=typed, cwd=tmp_path)
    assert result.status == 0, result
    assert "-: standard input has the answers here" in result.stdout
    assert set(contents(server.folder)) == {"-", "report.pdf"}


@pytest.mark.parametrize(
    ("answer", "posix", "words"),
    [
        ("My\\ File 'My Files/it' it\\'s", True, ["My File", "My Files/it", "it's"]),
        (
            r""""C:\My Files\a.txt" C:\it's "E:\b c" """,
            False,
            [r"C:\My Files\a.txt", r"C:\it's", r"E:\b c"],
        ),
    ],
)
def test_what_a_terminal_makes_of_several_dragged_files_is_split(
    answer: str, posix: bool, words: list[str]
) -> None:
    assert split_words(answer, posix) == words


def test_a_path_that_is_not_there_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    make_file(tmp_path / "report.pdf", 100)
    typed = b"report.pfd\n-\nreport.pdf\n"
    result = run_script("client.py", "file", f"--port={server.port}", stdin=typed, cwd=tmp_path)
    assert result.status == 0, result
    lines = result.stdout.splitlines()
    assert lines[:3] == ["File name: report.pfd", "report.pfd: no such file", "File name: -"]
    assert lines[3].startswith("-: standard input has the answers here: send what a program prints")
    assert set(contents(server.folder)) == {"report.pdf"}


@linux
def test_a_name_that_is_no_text_can_be_typed(server: Server, tmp_path: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    source.write_bytes(b"content")
    result = run_script(
        "client.py",
        "file",
        f"--port={server.port}",
        stdin=os.fsencode(source) + b"\n",
        env={"PYTHONIOENCODING": "utf-8:strict"},  # as most systems have it
    )
    assert result.status == 0, result
    assert contents(server.folder) == {source.name: b"content"}


def test_the_pairing_code_is_asked_for_among_the_other_questions(
    paired: Server, tmp_path: Path
) -> None:
    source = make_file(tmp_path / "report.pdf", 1000)
    answers = f"file\nshort\n{OTHER_CODE}\n{CODE}\nreport.pdf\n".encode()
    result = run_script("client.py", f"--port={paired.port}", stdin=answers, cwd=tmp_path)
    assert result.status == 0, result
    assert result.stdout.splitlines() == [
        "Mode (file/audio): file",
        "Pairing code: short",
        f"Pairing code: {OTHER_CODE}",
        f"Pairing code: {CODE}",
        "File name: report.pdf",
        f"Saved as report.pdf, SHA-256 matches ({sha256(source)[:8]}...)",
    ]
    assert len(result.error_lines) == 2


def test_no_question_is_asked_in_the_midst_of_data(paired: Server) -> None:
    answers = f"sound\naudio\n{OTHER_CODE}\n".encode()
    result = run_script("client.py", "--output=-", f"--port={paired.port}", stdin=answers)
    assert (result.status, result.stdout) == (1, "")
    assert "Mode (file/audio): audio\nPairing code: " in result.stderr
    assert "no answer to 'Pairing code': end of input" in result.stderr


def test_the_server_is_tried_before_a_path_is_asked_for(tmp_path: Path) -> None:
    result = run_script("client.py", f"--port={free_port()}", stdin=b"file\nx\n", cwd=tmp_path)
    assert result.status == 1
    assert "File name" not in result.stdout
    assert result.error_lines[0].startswith("no server at ")


def test_no_place_is_held_at_the_server_while_the_user_types(inbox: Path, tmp_path: Path) -> None:
    source = make_file(tmp_path / "file", 10)
    with (
        Server(inbox, "--max-clients", "1") as server,
        server.client(cwd=tmp_path, terminal=True) as waiting,
    ):
        waiting.expect("File name: ")
        assert server.send(source).status == 0


@pytest.mark.parametrize("typed", ["f", "F", "fi", " File "])
def test_the_beginning_of_a_mode_will_do(server: Server, tmp_path: Path, typed: str) -> None:
    make_file(tmp_path / "x", 10)
    stdin = f"{typed}\nx\n".encode()
    result = run_script("client.py", f"--port={server.port}", stdin=stdin, cwd=tmp_path)
    assert result.status == 0, result
    assert set(contents(server.folder)) == {"x"}


def test_a_file_in_place_of_the_mode_is_sent(server: Server, tmp_path: Path) -> None:
    make_file(tmp_path / "report.pdf", 10)
    make_file(tmp_path / "other", 20)
    command = ("report.pdf", "other", "--retry=5", f"--port={server.port}")
    assert run_script("client.py", *command, cwd=tmp_path).status == 0
    assert set(contents(server.folder)) == {"report.pdf", "other"}


def test_a_mode_that_is_neither_mode_nor_file_is_told(tmp_path: Path) -> None:
    result = run_script("client.py", "reprot.pdf", cwd=tmp_path)
    assert result.status == 2
    assert "'reprot.pdf' is neither a mode (file or audio) nor a file" in result.error_lines[-1]


def test_tab_completes_names_in_a_terminal(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("readline", reason="this Python was built without readline")
    make_file(tmp_path / "home" / "some folder" / "unmistakable name.txt", 100)
    with server.client(cwd=tmp_path / "home", terminal=True) as client:
        client.expect("File name: ")
        client.type("so\t")
        client.expect("some folder/")
        client.type("unm\t")
        client.expect(r"unmistakable name\.txt")
        client.type("\r")
        client.expect(r"Saved as unmistakable name\.txt")
        assert client.wait().status == 0


def test_what_is_typed_as_standard_input_ends_at_the_first_ctrl_d(server: Server) -> None:
    with server.client("-", "--name", "typed", terminal=True) as client:
        client.type("one line\n\x04")
        client.expect("Saved as typed")
        assert client.wait().status == 0
    assert contents(server.folder) == {"typed": b"one line\n"}


def test_tab_completes_below_the_home_folder(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("readline", reason="this Python was built without readline")
    make_file(tmp_path / "home" / "unmistakable.txt", 100)
    home = tmp_path / "home"
    with server.client(cwd=home, terminal=True, env={"HOME": str(home)}) as client:
        client.expect("File name: ")
        client.type("~/unm\t")
        client.expect(r"istakable\.txt")
        client.type("\r")
        client.expect(r"Saved as unmistakable\.txt")
        assert client.wait().status == 0


# --- arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["server.py", "client.py"])
@pytest.mark.parametrize("port", ["-1", "65536", "x", "", "1.5", "99999999999999999999"])
def test_a_bad_port_is_a_wrong_argument(script: str, port: str) -> None:
    result = run_script(script, "file", f"--port={port}")
    assert result.status == 2
    assert "--port" in result.error_lines[-1]


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "*", "..", "x" * 300])
def test_an_address_that_is_not_this_machines_is_one_line(host: str, tmp_path: Path) -> None:
    result = run_script("server.py", "file", "--port", "0", f"--host={host}", cwd=tmp_path)
    assert result.status == 1
    assert result.error_lines[-1].startswith(f"cannot listen on {host}"), result
    # For the C library "*" is all addresses, each of them twice.
    advice = "see --port" if host == "*" else "--host 0.0.0.0 is all"
    assert advice in result.error_lines[-1]


@pytest.mark.parametrize("count", ["0", "-1", "many", ""])
def test_a_bad_number_of_clients_is_a_wrong_argument(count: str) -> None:
    result = run_script("server.py", "file", f"--max-clients={count}")
    assert result.status == 2
    assert "--max-clients" in result.error_lines[-1]


def test_names_that_look_like_options_reach_no_terminal_raw() -> None:
    result = run_script("client.py", "file", "--\x1b[31mred", "report.pdf")
    assert result.status == 2
    assert result.error_lines[0].endswith(r"--\x1b[31mred report.pdf (see client.py --help)")


@pytest.mark.parametrize(
    "command",
    [
        "client.py file -",
        "client.py file - - --name x",
        "client.py file some --name x",
        "client.py file some --latency 20",
        "client.py file some --find --host 192.0.2.1",
        "client.py audio some",
        "client.py video",
        "client.py file -q -v some",
        "client.py file --unknown",
        "client.py file some --host=",
        "server.py file --host=",
        "server.py file --port 0 inbox",
        "server.py 0.0.0.0",
        "server.py file --rate 48000",
        "client.py --opus audio",
        "client.py file --code KQ7M 2XFD",
        "server.py audio --overwrite",
        "server.py video",
        "server.py file inbox",
        "client.py nas:50008",
    ],
)
def test_arguments_that_make_no_sense_are_refused(command: str) -> None:
    script, *args = command.split()
    result = run_script(script, *args)
    assert result.status == 2
    assert len(result.error_lines) == 1
    assert result.error_lines[0].startswith(f"{script}: error: ")


@pytest.mark.parametrize(
    ("command", "answer", "told"),
    [
        ("client.py --record x.wav", "file", "--record is for audio mode"),
        ("client.py --retry 3", "audio", "--retry is for file mode"),
        ("server.py --rate 8000", "file", "--rate is for audio mode"),
        ("server.py --overwrite", "audio", "--overwrite is for file mode"),
    ],
)
def test_an_option_of_the_other_mode_is_refused_also_where_the_mode_was_asked_for(
    command: str, answer: str, told: str, tmp_path: Path
) -> None:
    script, *args = command.split()
    result = run_script(script, *args, "--port=1", stdin=f"{answer}\n".encode(), cwd=tmp_path)
    assert result.status == 2
    assert result.error_lines == [f"{script}: error: {told} (see {script} --help)"]


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_a_bad_code_in_the_environment_is_told_as_that(script: str) -> None:
    result = run_script(script, "file", env={"SOCKET_PAIR_CODE": "short"})
    assert result.status == 2
    (line,) = result.error_lines
    assert line.startswith(f"{script}: error: SOCKET_PAIR_CODE: a pairing code has at least 8 ")


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_help_and_version_are_there(script: str) -> None:
    assert re.fullmatch(r"Socket Pair \d+\.\d+\.\d+\n", run_script(script, "--version").stdout)
    shown = run_script(script, "--help")
    assert shown.status == 0
    assert "examples:" in shown.stdout
    assert script in shown.stdout
