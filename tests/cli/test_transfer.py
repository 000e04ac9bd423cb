"""Progress of a transfer: a bar on a terminal, a line now and then in a pipe, nothing when it is not wanted."""

from __future__ import annotations

import io
import sys

import pytest

from pipeline.cli import transfer


def test_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(transfer, "SAY_EVERY_S", 0.0)
    with transfer.advancing("pull x", 4_000_000, hidden=False) as advance:
        advance(1_000_000)
        advance(2_000_000)
        advance(-1_000_000)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "pull x: 1.0 MB of 4.0 MB (25 %)",
        "pull x: 3.0 MB of 4.0 MB (75 %)",
        "pull x: 2.0 MB of 4.0 MB (50 %)",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with transfer.advancing("pull x", 4_000_000, hidden=False) as advance:
        advance(4_000_000)
    assert "pull x" in terminal.getvalue() and "4.0/4.0 MB" in terminal.getvalue()


def test_nothing_when_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with transfer.advancing("pull x", 4_000_000, hidden=True) as advance:
        advance(4_000_000)
    assert capsys.readouterr().err == ""
