"""A recipe of 1,000 targets is planned in a second, and in time that grows with the targets, not with their square."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.run import toolchain
from tests.e2e.harness import ALL_TARGETS, Done, Site

HEAD = ALL_TARGETS.partition("targets:\n")[0]
TARGET = "  t{0}: {{runtime: onnxruntime, precision: int4, threads: {0}, quantize: {{group_size: 32}}}}\n"


def planned(place: Path, count: int) -> Done:
    """`build --plan` of so many targets."""
    site = Site.write(place, HEAD + "targets:\n" + "".join(TARGET.format(number) for number in range(count)))
    done = site.build("--plan")
    assert done.code == 0, done.err
    assert f"{4 * count + 6} of {4 * count + 6} steps to run" in done.out
    return done


def test_a_plan_of_1000_targets(tmp_path: Path) -> None:
    one, some, many = (planned(tmp_path / str(count), count).cpu_s for count in (1, 250, 1000))
    assert many < 3  # 0.8 on an idle machine; without the cache of versions it is 6
    assert many - one < 8 * (some - one)  # 4 is linear, 16 quadratic


def test_a_packages_version_is_read_once_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.cli.prepare import prepare
    from pipeline.store import Store

    read: list[tuple[str, str]] = []
    version = toolchain.version
    monkeypatch.setattr(toolchain, "version", lambda d, c, t: read.append((d, c)) or version(d, c, t))
    site = Site.write(tmp_path / "site", HEAD + "targets:\n" + "".join(TARGET.format(number) for number in range(9)))
    prepare(site.root / "recipe.yaml", Store(site.cache))
    assert len(read) == len(set(read)) > 0
