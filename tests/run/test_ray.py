"""A plan on a Ray cluster of three nodes of this machine, which claim to have GPUs. Needs Ray: `pip install .[ray]`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StageError, UnavailableError
from pipeline.hardware import load, probe
from pipeline.plan import Plan, plan
from pipeline.run.budget import Budget
from pipeline.run.once import Event
from pipeline.run.ray import RayRunner, accelerators
from pipeline.step import Step
from pipeline.store import Store
from tests.conftest import ROOT
from tests.e2e.harness import Site, wait_for
from tests.e2e.test_kill_often import RECIPE
from tests.fakes import ON_DEVICE, WRITE, Write
from tests.shared import s3
from tests.shared.s3 import S3

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def test_rays_names_of_the_gpus_with_a_compute_capability() -> None:
    assert accelerators("9.0") == ["H100", "H200"]
    assert accelerators("7.5") == ["T4"]
    assert "GeForce-RTX-4090" in accelerators("8.9")
    assert accelerators("1.0") == []


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3.running(tmp_path_factory.mktemp("s3")) as served:
        yield served


@pytest.fixture(scope="module")
def cluster(bucket: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head with two cores, and two nodes with a made-up T4 and a made-up H100; each has a store of its own."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'enginewright[ray]'")
    stores = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**QUIET, **bucket.env, "PYTHONPATH": str(ROOT)}.items():  # where these tests' stages are
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        def env_vars(name: str) -> dict[str, str]:
            return {"ENGINEWRIGHT_CACHE": str(stores / name)}

        head = {"num_cpus": 2, "include_dashboard": False, "env_vars": env_vars("head")}
        made = Cluster(initialize_head=True, head_node_args=head)
        made.stores = stores
        for kind in ("T4", "H100"):
            resources = {f"accelerator_type:{kind}": 1}
            made.add_node(num_cpus=2, num_gpus=1, resources=resources, env_vars=env_vars(kind))
        yield made
        made.shutdown()


@pytest.fixture
def runner(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RayRunner, list[Event]]:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    events: list[Event] = []
    return RayRunner(Store(tmp_path / "cache"), events.append, {}, Budget(cores=2)), events


def planned(text: str = "", *, fail: str = "", gpus: tuple[str, ...] = ("t4", "h100"), sleep_s: float = 0) -> Plan:
    """A target for each GPU: a common step, and one on the device."""
    targets = {}
    for gpu in gpus:
        steps = (
            Step("common", WRITE, Write(text=text + "a"), {}),
            Step("engine", ON_DEVICE, Write(text="b", fail=fail, sleep_s=sleep_s), {"first": "common"}),
        )
        targets[gpu] = (steps, load(gpu) if gpu != "host" else probe())
    return plan(targets, lambda tool, chain: "1")


@pytest.mark.slow
def test_a_step_lands_where_its_device_is(runner: tuple[RayRunner, list[Event]], cluster: Any) -> None:
    run, events = runner
    made = planned()
    done = run.run(made)
    kinds = {}
    for gpu, keys in made.targets.items():
        engine = done[keys["engine"]].out
        assert (engine / "text").read_text() == "ab"
        kinds[gpu] = next(event["node"] for event in events if event["key"] == keys["engine"])
    nodes = {node.node_id: node for node in cluster.list_all_nodes()}
    offered = {gpu: nodes[node]._ray_params.resources for gpu, node in kinds.items()}
    assert offered["t4"] == {"accelerator_type:T4": 1}
    assert offered["h100"] == {"accelerator_type:H100": 1}
    assert [event["step"] for event in events if event["event"] == "done"].count("common") == 1
    events.clear()
    assert run.run(made).keys() == done.keys()
    assert {event["event"] for event in events} == {"hit"}


@pytest.mark.slow
def test_what_no_node_has_is_refused_before_anything_runs(runner: tuple[RayRunner, list[Event]]) -> None:
    run, events = runner
    with pytest.raises(UnavailableError, match=r"capability 10\.0.*accelerator_type:H100, accelerator_type:T4"):
        run.run(planned(gpus=("b200",)))
    assert not events


@pytest.mark.slow
def test_a_failed_step_comes_back_with_its_kind_and_its_log(runner: tuple[RayRunner, list[Event]]) -> None:
    run, _ = runner
    with pytest.raises(StageError, match="ZeroDivisionError: a bug") as caught:
        run.run(planned(fail="bug", gpus=("t4",)))
    assert "repeat it with" in caught.value.hint
    with pytest.raises(UnavailableError, match="this needs a thing"):
        run.run(planned(fail="unavailable", gpus=("t4",)))


@pytest.mark.slow
def test_one_node_killed_in_the_middle_leaves_the_same_artifacts(cluster: Any, tmp_path: Path) -> None:
    """The machine goes: its raylet and all that runs on it, in the middle of a step."""
    here = Site.write(tmp_path / "here", RECIPE)
    expected = here.made()
    site = Site.write(tmp_path / "there", RECIPE, out=tmp_path / "there-out")
    victim = cluster.add_node(num_cpus=4)
    build = site.start("--on", "ray", "--events", site.root / "events", env={**QUIET, "RAY_ADDRESS": cluster.address})

    def under_way() -> list[int]:
        """Workers of steps that run on the victim."""
        return [pid for pid in workers(site) if victim_pid(victim) in ancestors(pid)]

    found = wait_for(under_way, "a step on the node", 120)
    cluster.remove_node(victim, allow_graceful=False)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in found), "its steps end with it")
    done = build.end()
    assert done.code == 0, done.err
    assert site.ids() == expected
    assert not site.leftovers()
    shutil.rmtree(site.cache)


def victim_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def workers(site: Site) -> list[int]:
    """Child processes of steps of a site's store."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"pipeline.run.worker" in words and any(word.startswith(bytes(site.cache)) for word in words):
            found.append(int(place.name))
    return found


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(pid)
    return found


@pytest.mark.slow
def test_a_killed_raylet_of_a_cluster_of_ones_own_is_a_clear_error(tmp_path: Path) -> None:
    """The head itself is lost: nothing can go on, and the next build does."""
    pytest.importorskip("ray")
    site = Site.write(tmp_path / "site", RECIPE)
    build = site.start("--on", "ray", env=QUIET)
    wait_for(lambda: workers(site), "a step", 120)
    raylets = {pid for worker in workers(site) for pid in ancestors(worker) if "raylet" in command_of(pid)}
    assert raylets
    for pid in raylets:
        os.kill(pid, signal.SIGKILL)
    done = build.end()
    assert done.code != 0
    assert "Traceback" not in done.err, done.err
    assert site.made() == site.ids()
    assert not site.leftovers()


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


@pytest.mark.slow
def test_nodes_that_share_no_folder_have_their_results_from_the_shared_store(
    cluster: Any, bucket: S3, tmp_path: Path
) -> None:
    """What a step needs comes out of a bucket, and so does what the builder gets."""
    here = Site.write(tmp_path / "here", RECIPE)
    expected = here.made()
    site = Site.write(tmp_path / "there", RECIPE, out=tmp_path / "there-out")
    shared = {**bucket.env, "ENGINEWRIGHT_SHARED": f"s3://{s3.BUCKET}/store"}
    done = site.build("--on", "ray", env={**QUIET, **shared, "RAY_ADDRESS": cluster.address})
    assert done.code == 0, done.err
    assert site.ids() == expected
    made = {path.name for path in site.entries("*")}
    nodes = [{path.name for path in (store / "results").iterdir()} for store in cluster.stores.iterdir()]
    assert made == set().union(*nodes)
    if len(nodes) > 1:  # what one made, another had as an input
        assert sum(len(node) for node in nodes) > len(made)
