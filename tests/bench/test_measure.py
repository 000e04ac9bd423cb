"""Measuring: the whole process tree counts, links count once, failures are figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import measure

from tests.conftest import ROOT

BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass"


def cost(tmp_path: Path, code: str) -> measure.Cost:
    command = (sys.executable, "-c", code)
    return measure.run(command, cwd=tmp_path, environment=dict(os.environ), log=tmp_path / "logs" / "log")


def test_a_child_of_the_command_counts(tmp_path: Path) -> None:
    burn = BURN.format(0.3)
    inner = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    assert 0.3 <= cost(tmp_path, inner).cpu_s < 3


def test_peak_is_of_the_largest_process(tmp_path: Path) -> None:
    # In an interpreter of its own: the pages of the process that forks count, and pytest may hold torch.
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'bytes(range(256)) * 400000'])"
    code = (
        "import os, sys, measure, pathlib\n"
        "for code in ('pass', sys.argv[1]):\n"
        "    command = (sys.executable, '-c', code)\n"
        "    log = pathlib.Path('log')\n"
        "    print(measure.run(command, cwd=log.parent, environment=dict(os.environ), log=log).peak_bytes)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    command = (sys.executable, "-c", code, inner)
    printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    small, large = map(int, printed.split())
    assert small < 60_000_000
    assert large > small + 80_000_000


def test_exit_code_and_output_are_kept(tmp_path: Path) -> None:
    assert cost(tmp_path, "import sys; print('out'); sys.exit(7)").exit_code == 7
    assert "out" in (tmp_path / "logs" / "log").read_text("utf-8")


def test_two_commands_add_up_and_keep_the_first_failure() -> None:
    both = measure.Cost(1, 2, 300, 4) + measure.Cost(10, 20, 100, 0)
    assert both == measure.Cost(11, 22, 300, 4)


def test_links_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "cache" / "weights").write_bytes(os.urandom(1 << 16))
    once = measure.disk_bytes([tmp_path])
    os.link(tmp_path / "cache" / "weights", tmp_path / "out" / "weights")
    assert measure.disk_bytes([tmp_path]) == once == measure.disk_bytes([tmp_path / "out"])
    (tmp_path / "out" / "copy").write_bytes((tmp_path / "cache" / "weights").read_bytes())
    assert measure.disk_bytes([tmp_path]) == 2 * once


def test_median_keeps_the_range_and_every_exit_code() -> None:
    figures = measure.median([measure.Cost(3, 1, 5, 0), measure.Cost(1, 2, 7, 1), measure.Cost(2, 3, 6, 0)])
    assert figures["cpu_s"] == 2
    assert figures["cpu_s_range"] == [1, 3]
    assert figures["peak_bytes"] == 6
    assert figures["exit_codes"] == [0, 1]
    assert figures["runs"] == 3
