"""What the README says is so: options, packages, commands and links."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

import pytest

import client
import server
from recipes import MODULES, README, read_block
from support import ROOT

OPTION = re.compile(r"--[a-z][a-z-]+")
# What Python, pip and the system say, or too few words of the programs' own to look for.
NOT_OURS = ["SyntaxError", "file too large", "is for audio mode", "for file mode", "several"]
NOT_OURS += ["no microphone found", "no loudspeaker found"]


def section(title: str) -> str:
    """Return what stands under a heading, up to the next one of its level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", README, re.DOTALL | re.M)
    assert found, title
    return found[2]


def table(text: str) -> list[list[str]]:
    """Return the cells of the tables in `text`, row by row, without their heads."""
    lines = [line for line in text.split("\n") if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("parse", [server.parse_arguments, client.parse_arguments])
def test_every_option_is_in_the_readme(
    parse: Callable[[list[str]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = set(OPTION.findall(capsys.readouterr().out.partition("examples:")[0]))
    assert told <= set(OPTION.findall(section("Options")))


def test_no_option_is_in_the_readme_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    for parse in (server.parse_arguments, client.parse_arguments):
        with pytest.raises(SystemExit):
            parse(["--help"])
    there = set(OPTION.findall(capsys.readouterr().out))
    named = [cells[0] for cells in table(section("Options"))]
    assert set(OPTION.findall(" ".join(named))) <= there


def texts() -> Iterator[str]:
    """Give all texts of the programs; what is put into them is a `…`."""
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(each, "value", "") for each in node.values)
                yield "".join(each if isinstance(each, str) else "…" for each in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_symptom_has_words_that_the_programs_print() -> None:
    printed = "\n".join(texts())
    symptoms = [cells[0] for cells in table(section("Troubleshooting"))]
    for symptom in re.findall(r"`([^`]+)`", " ".join(symptoms)):
        words = re.sub(r"\b\d[\d.]*", "…", symptom).split()
        runs = [" ".join(words[at : at + 3]) for at in range(len(words) - 2)]
        runs = [run for run in runs if run.count("…") < 2]
        is_ours = not any(each in symptom for each in NOT_OURS)
        # The others have names in them.
        assert not is_ours or sum(run in printed for run in runs) >= len(runs) / 4, symptom


def test_every_package_is_in_the_readme() -> None:
    required = (ROOT / "requirements.txt").read_text()
    names = set(re.findall(r"^[a-z0-9-]+", required, re.M))
    rows = table(section("Other systems and packages"))
    assert names == {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


@pytest.mark.parametrize("mark", ["run command", "test command"])
def test_a_command_is_one_line_to_copy(mark: str) -> None:
    assert read_block(mark, "sh").count("\n") == 1


def test_every_link_leads_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
