"""`build --shared s3://...`: builders in processes of their own, each with its own store, and a server that may die."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.harness import ALL_TARGETS, COPIES, Site, refused, wait_for
from tests.shared import s3
from tests.shared.s3 import BUCKET, S3

RECIPE = ALL_TARGETS.partition("  cpu-int8:")[0] + ALL_TARGETS[ALL_TARGETS.index("  cpu-int4:") :]
"""Two targets of one model."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.write(tmp_path_factory.mktemp("site"), RECIPE)


@pytest.fixture(scope="module")
def expected(site: Site) -> dict[str, str]:
    """What a build without a shared store makes."""
    return site.made()


def other(site: Site, place: Path, env: Mapping[str, str]) -> Site:
    """Another machine: the same recipe, a store of its own."""
    return replace(site, cache=place / "cache", out=place / "out", env=env)


def test_two_builders_race_for_the_same_keys(
    site: Site, expected: dict[str, str], bucket: S3, s3_url: str, tmp_path: Path
) -> None:
    sites = [other(site, tmp_path / name, bucket.env) for name in ("one", "two")]
    builds = [each.start("--shared", s3_url, "--format", "json") for each in sites]
    ends = [build.end() for build in builds]
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    assert sites[0].ids() == sites[1].ids() == expected
    prefix = s3_url.removeprefix(f"s3://{BUCKET}/")
    records, blobs = list(bucket.objects(f"{prefix}/results/")), bucket.objects(f"{prefix}/blobs/")
    assert sorted(Path(name).stem for name in records) == sorted(path.name for path in sites[0].entries("*"))
    for name in records:  # every blob that a record names is there, whole
        for file in json.loads(bucket.read(name))["files"]:
            digits = file["digest"].removeprefix("sha256:")
            assert blobs[f"{prefix}/blobs/sha256/{digits[:2]}/{digits}"] == file["size"]
    third = other(site, tmp_path / "three", bucket.env)
    planned = third.build("--shared", s3_url, "--plan")
    assert "0 of" in planned.out
    assert f"{len(records)} in the shared store" in planned.out
    assert third.ran("--shared", s3_url) == []
    assert third.ids() == expected


def test_a_corrupt_object_is_built_again(bucket: S3, s3_url: str, tmp_path: Path) -> None:
    """The largest: the weights of the model."""
    site = Site.write(tmp_path / "site", COPIES)
    first = other(site, tmp_path / "one", bucket.env)
    expected = first.made("--shared", s3_url)
    name, size = max(
        bucket.objects(f"{s3_url.removeprefix(f's3://{BUCKET}/')}/blobs/").items(), key=lambda item: item[1]
    )
    bucket.write(name, os.urandom(size))
    second = other(site, tmp_path / "two", bucket.env)
    done = second.build("--shared", s3_url)
    assert done.code == 0, done.err
    assert "in the shared store is corrupt" in done.err
    assert second.ids() == expected
    third = other(site, tmp_path / "three", bucket.env)
    assert third.ran("--shared", s3_url) == []
    assert third.ids() == expected


@pytest.mark.parametrize("victim", ["server", "builder"])
def test_killed_in_the_middle(victim: str, site: Site, expected: dict[str, str], tmp_path: Path) -> None:
    """Of the server: the builds go on without it. Of a builder: what it left is whole, and the next goes on."""
    with s3.running(tmp_path / "s3") as served:
        url, here = f"s3://{BUCKET}/store", other(site, tmp_path / "here", served.env)
        build = here.start("--shared", url, env={"AWS_MAX_ATTEMPTS": "1"})
        wait_for(served.objects, "a result is shared")
        time.sleep(random.Random(20261127).uniform(0, 4))
        if victim == "server":
            os.kill(served.pid, signal.SIGKILL)
            done = build.end()
            assert done.code == 0, done.err
            assert "cannot be used" in done.err
            assert here.ids() == expected
            return
        build.signal(signal.SIGKILL)
        build.end()
        there = other(site, tmp_path / "there", served.env)
        assert there.made("--shared", url) == expected
        assert here.made("--shared", url) == expected


def test_ci_of_a_fork_reads_and_does_not_write(tmp_path: Path) -> None:
    site = Site.write(tmp_path / "site", COPIES)
    shared = tmp_path / "shared"
    shared.mkdir()
    read = {"ENGINEWRIGHT_SHARED": shared.as_uri(), "ENGINEWRIGHT_SHARED_READ_ONLY": "1"}
    site.made(env=read)
    assert not list(shared.iterdir())
    upstream = other(site, tmp_path / "upstream", {})
    upstream.made("--shared", shared.as_uri())
    fork = other(site, tmp_path / "fork", read)
    assert fork.ran() == []
    assert fork.ids() == upstream.ids()


def test_offline_asks_no_server(tmp_path: Path) -> None:
    site = Site.write(tmp_path / "site", COPIES)
    done = site.build("--offline", "--shared", "s3://store/x")
    assert done.code == 0
    assert "--offline: the shared store is not asked" in done.err


def test_what_is_no_shared_store_is_refused_before_anything_runs(tmp_path: Path) -> None:
    site = Site.write(tmp_path / "site", COPIES)
    refused(site.build("--shared", "bucket"), 64, "is not a URL", "s3://BUCKET/PREFIX")
    assert not site.entries("*")
