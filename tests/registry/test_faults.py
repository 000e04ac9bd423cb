"""Everything that goes wrong between a registry and a disk: told by its exit code, and nothing wrong is left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact.verify import examine
from pipeline.digest import canonical
from pipeline.registry import layout, media
from tests.e2e.harness import Running, mounted, wait_for
from tests.registry.door import WEIGHTS, artifacts, clean, enginewright, ok, refused
from tests.registry.proxy import Fault, Proxy
from tests.registry.server import Registry

WEIGHT_DIGEST = f"sha256:{hashlib.sha256(WEIGHTS).hexdigest()}"


@pytest.fixture
def pushed(proxy: Proxy, repository: str, made: Path) -> str:
    """A version in a repository of its own, seen through the proxy."""
    ok("push", made, f"{proxy.address}/{repository}")
    proxy.log.clear()
    return f"{proxy.address}/{repository}:1.0.0"


@pytest.fixture
def damaged(own_registry: Registry, made: Path, tmp_path: Path) -> tuple[str, Path, Path]:
    """A reference, the file in which the registry keeps the weights, and a folder with an earlier artifact."""
    ref = f"{own_registry.address}/models/tiny:1.0.0"
    ok("push", made, ref)
    old = artifacts(tmp_path / "old", version="0.9.0", weights=b"old " * 1000)
    out = tmp_path / "artifacts"
    shutil.copytree(old, out / "tiny")
    return ref, own_registry.blob(WEIGHT_DIGEST), out


def spoilt(file: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [lambda data: data.__setitem__(1_000_000, data[1_000_000] ^ 1), lambda data: data.__setitem__(-1, data[-1] ^ 1)],
    ids=["in the middle", "the last"],
)
def test_a_byte_that_changed_in_the_registrys_storage(
    damaged: tuple[str, Path, Path], tmp_path: Path, change: Callable[[bytearray], object]
) -> None:
    ref, file, out = damaged
    spoilt(file, change)
    refused(enginewright("pull", ref, "--out", tmp_path / "new"), 6, "model.onnx", "has other contents", WEIGHT_DIGEST)
    clean(tmp_path / "new")
    # Of what is wrong nothing is kept; the part of another file that was under way is, and the next pull resumes it.
    assert not list((tmp_path / "new").rglob(f".{WEIGHT_DIGEST.removeprefix('sha256:')}.partial"))
    refused(enginewright("pull", ref, "--out", out), 6, "model.onnx")
    assert examine(out / "tiny/cpu").ok
    assert json.loads((out / "tiny/cpu/manifest.json").read_bytes())["version"] == "0.9.0"
    refused(enginewright("verify", ref), 6, "model.onnx", "has other contents")
    refused(enginewright("copy", ref, f"oci-archive:{tmp_path}/x.tar"), 6, "has other contents")
    refused(enginewright("copy", ref, f"oci:{tmp_path}/x"), 6, "has other contents")
    assert not list(tmp_path.glob("*x.tar*"))
    assert ok("ls", f"oci:{tmp_path}/x", "--format", "json").json == []


def test_a_truncated_blob_in_the_registrys_storage(damaged: tuple[str, Path, Path], made: Path, tmp_path: Path) -> None:
    ref, file, out = damaged
    spoilt(file, lambda data: data.__delitem__(slice(-1, None)))
    done = enginewright("pull", ref, "--out", tmp_path / "new")
    refused(done, 6, "model.onnx", "ended after 3,071,999 of 3,072,000 bytes")
    clean(tmp_path / "new")
    refused(enginewright("pull", ref, "--out", out), 6, "model.onnx")
    assert examine(out / "tiny/cpu").ok
    # docker-registry keeps the file that it has: a push says so instead of calling it done.
    refused(enginewright("push", made, ref), 6, WEIGHT_DIGEST, "removed there")
    file.unlink()
    ok("push", made, ref)
    ok("pull", ref, "--out", out)


def manifest_of(registry: Registry, repository: str, change: Callable[[Any], object]) -> str:
    """A manifest of the target `cpu` that somebody altered, pushed past our client; its reference."""
    value = registry.manifest(repository, "1.0.0-cpu")
    change(value)
    data = json.dumps(value).encode()
    status, _, said = registry.ask("PUT", f"/v2/{repository}/manifests/altered", data, media.MANIFEST)
    assert status == 201, said
    return f"{registry.address}/{repository}:altered"


def own_manifest(registry: Registry, repository: str, change: Callable[[Any], object]) -> Callable[[Any], object]:
    """A change of an OCI manifest: its manifest.json becomes another one."""

    def replace(value: Any) -> None:
        layer = value["layers"][0]
        _, _, data = registry.ask("GET", f"/v2/{repository}/blobs/{layer['digest']}")
        own = json.loads(data)
        change(own)
        data = canonical(own)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        _, headers, _ = registry.ask("POST", f"/v2/{repository}/blobs/uploads/", b"")
        place = headers["Location"].partition(registry.address)[2]
        assert registry.ask("PUT", f"{place}&digest={digest}", data, "application/octet-stream")[0] == 201
        layer |= {"digest": digest, "size": len(data)}

    return replace


def hostile(path: str) -> Callable[[Registry, str], Callable[[Any], object]]:
    """The weights under another path, in both manifests."""

    def change(registry: Registry, repository: str) -> Callable[[Any], object]:
        def own(value: Any) -> None:
            next(file for file in value["files"] if file["path"] == "model.onnx")["path"] = path
            value["files"].sort(key=lambda file: file["path"])

        replace = own_manifest(registry, repository, own)

        def both(value: Any) -> None:
            layer = next(each for each in value["layers"] if each["annotations"][media.PATH] == "model.onnx")
            layer["annotations"] = {media.PATH: path, media.TITLE: path}
            replace(value)

        return both

    return change


def layer_of(value: Any, path: str = "model.onnx") -> Any:
    return next(each for each in value["layers"] if each["annotations"][media.PATH] == path)


ALTERED: dict[str, tuple[Callable[[Registry, str], Callable[[Any], object]], str]] = {
    "a wrong size": (lambda r, n: lambda v: layer_of(v).__setitem__("size", 5), "the registry says 5 bytes"),
    "a size that is huge": (lambda r, n: lambda v: layer_of(v).__setitem__("size", 2**52), "bytes, and the manifest"),
    "a wrong size in both": (
        lambda r, n: (
            lambda v: (
                layer_of(v).__setitem__("size", 5),
                own_manifest(
                    r, n, lambda own: next(f for f in own["files"] if f["path"] == "model.onnx").__setitem__("size", 5)
                )(v),
            )
        ),
        "more than the 5 bytes that were announced",
    ),
    "a negative size": (lambda r, n: lambda v: layer_of(v).__setitem__("size", -1), "is not a size"),
    "exchanged layers": (
        lambda r, n: lambda v: layer_of(v).__setitem__("digest", layer_of(v, "tokenizer.json")["digest"]),
        "model.onnx: the registry has sha256:",
    ),
    "a layer too many": (
        lambda r, n: (
            lambda v: v["layers"].append(layer_of(v) | {"annotations": {media.PATH: "evil.py", media.TITLE: "evil.py"}})
        ),
        "'evil.py': is not in the manifest",
    ),
    "a layer too few": (
        lambda r, n: lambda v: v["layers"].remove(layer_of(v, "extra/note.json")),
        "extra/note.json: the registry has no layer for it",
    ),
    "a layer twice": (lambda r, n: lambda v: v["layers"].append(layer_of(v)), "stands twice"),
    "no manifest of ours": (lambda r, n: lambda v: v["layers"].pop(0), "has no manifest.json"),
    "a path that leaves": (hostile("../../evil"), "leaves the artifact with '..'"),
    "an absolute path": (hostile("/tmp/evil"), "is absolute"),
    "a path in .attest": (hostile(".attest/parity.json"), "is a name that the artifact itself uses"),
    "a path with a backslash": (hostile("a\\b"), "has a backslash"),
    "a path that steers a terminal": (hostile("a\x1b[2J"), "control character"),
    "a path that is another in capitals": (hostile("Tokenizer.json"), "is the same file as"),
    "a target's name that leaves": (
        lambda r, n: own_manifest(r, n, lambda own: own["target"].__setitem__("name", "../../evil")),
        "is no name that a folder may have",
    ),
    "a model's name that leaves": (
        lambda r, n: own_manifest(r, n, lambda own: own.__setitem__("name", "../evil")),
        "is no name that a folder may have",
    ),
    "another schema": (
        lambda r, n: own_manifest(r, n, lambda own: own.__setitem__("schema", "urn:enginewright:artifact:v9")),
        "update enginewright",
    ),
}


@pytest.mark.parametrize(("alter", "told"), ALTERED.values(), ids=list(ALTERED))
def test_manifests_that_somebody_altered(
    registry: Registry,
    proxy: Proxy,
    repository: str,
    made: Path,
    tmp_path: Path,
    alter: Callable[[Registry, str], Callable[[Any], object]],
    told: str,
) -> None:
    ok("push", made / "cpu", f"{registry.address}/{repository}:1.0.0")
    ref = manifest_of(registry, repository, alter(registry, repository))
    out = tmp_path / "out" / "deep" / "er"
    done = enginewright("pull", ref, "--target", "cpu", "--out", out)
    assert done.code in (6, 64), done.err
    refused(done if done.code == 6 else enginewright("pull", ref, "--out", out), 6, told)
    assert "\x1b" not in done.err
    clean(tmp_path / "out")
    assert not list(tmp_path.rglob("evil*"))


def test_a_line_that_breaks_is_taken_up_where_it_broke(proxy: Proxy, pushed: str, tmp_path: Path) -> None:
    proxy.faults = [Fault("cut", path=WEIGHT_DIGEST, value=700_000, times=3)]
    done = ok("pull", pushed, "--out", tmp_path, "--format", "json").json
    asked = [request.headers.get("range") for request in proxy.asked("GET", WEIGHT_DIGEST)]
    assert asked[0] is None and len(asked) == 4
    starts = [int(each.removeprefix("bytes=").rstrip("-")) for each in asked[1:] if each]
    assert len(starts) == 3 and starts == sorted(starts) and starts[0] > 0
    assert done["fetched_bytes"] >= len(WEIGHTS)
    assert examine(tmp_path / "tiny/cpu").ok


def test_a_line_that_always_breaks_at_the_same_place(proxy: Proxy, pushed: str, tmp_path: Path) -> None:
    proxy.faults = [Fault("cut", path=WEIGHT_DIGEST, value=0)]
    refused(enginewright("pull", pushed, "--out", tmp_path), 7, "cannot be reached", "run the command again")
    clean(tmp_path)
    proxy.faults = []
    ok("pull", pushed, "--out", tmp_path)


def test_an_answer_that_ends_early_and_politely(proxy: Proxy, pushed: str, tmp_path: Path) -> None:
    proxy.faults = [Fault("short", path=WEIGHT_DIGEST, value=1_000_000)]
    ok("pull", pushed, "--out", tmp_path)  # three parts make a whole
    proxy.faults = [Fault("short", path=WEIGHT_DIGEST, value=0)]
    refused(enginewright("pull", pushed, "--out", tmp_path / "b"), 6, "model.onnx", "ended after 0 of")
    clean(tmp_path / "b")


def test_an_upload_that_breaks_is_begun_again(
    registry: Registry, proxy: Proxy, repository: str, made: Path, tmp_path: Path
) -> None:
    proxy.faults = [Fault("cut upload", "PUT", "/blobs/uploads/", value=1_500_000, times=2)]
    ref = f"{proxy.address}/{repository}:1.0.0"
    ok("push", made, ref)
    assert registry.blob(WEIGHT_DIGEST).read_bytes() == WEIGHTS
    proxy.faults = []
    ok("pull", ref, "--out", tmp_path)


def test_an_upload_that_always_breaks_leaves_no_tag(
    registry: Registry, proxy: Proxy, repository: str, made: Path, tmp_path: Path
) -> None:
    proxy.faults = [Fault("cut upload", "PUT", "/blobs/uploads/", value=1_500_000)]
    ref = f"{proxy.address}/{repository}:1.0.0"
    refused(enginewright("push", made, ref), 7, "cannot be reached", "run the command again")
    assert registry.tags(repository) == []
    proxy.faults = []
    again = ok("push", made, ref, "--format", "json").json
    assert again["sent"]["present"] > 0  # what had arrived is not sent again
    ok("pull", ref, "--out", tmp_path)


@pytest.mark.parametrize("code", [429, 503])
def test_storms_are_waited_out(
    registry: Registry, proxy: Proxy, repository: str, made: Path, tmp_path: Path, code: int
) -> None:
    storm = [
        Fault("status", method, path, value=(code, {"Retry-After": "0"}), times=4)
        for method in ("HEAD", "POST", "PUT", "GET")
        for path in ("/blobs/", "/manifests/")
    ]
    ref = f"{proxy.address}/{repository}:1.0.0"
    proxy.faults = list(storm)
    ok("push", made, ref)
    assert len(proxy.asked("PUT", "/blobs/")) > 4
    proxy.faults = [Fault(f.kind, f.method, f.path, f.value, 4) for f in storm]
    ok("pull", ref, "--out", tmp_path)
    proxy.faults = [Fault("status", "GET", "/blobs/", value=(code, {"Retry-After": "0"}))]
    refused(enginewright("pull", ref, "--out", tmp_path / "b"), 7, f"answered {code}", "run the command again")
    clean(tmp_path / "b")


def test_a_registry_says_how_long_to_wait(proxy: Proxy, pushed: str, tmp_path: Path) -> None:
    proxy.faults = [Fault("status", "GET", "/manifests/", value=(429, {"Retry-After": "1"}), times=1)]
    started = time.monotonic()
    ok("ls", pushed)
    assert time.monotonic() - started >= 1


def test_a_registry_that_redirects(
    registry: Registry, proxy: Proxy, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blobs are often elsewhere. That place never sees the credentials."""
    login(tmp_path, monkeypatch, proxy.address)
    proxy.auth = "basic"
    with Proxy(registry.address) as store:
        proxy.faults = [Fault("redirect", "GET|HEAD", "/blobs/", value=f"http://{store.address}")]
        ok("pull", pushed, "--out", tmp_path)
        assert store.asked("GET", WEIGHT_DIGEST) and not proxy.asked("GET", "/token")
        assert all("authorization" not in request.headers for request in store.log)
        assert any("authorization" in request.headers for request in proxy.log)
    proxy.faults = [Fault("redirect", "GET", "/blobs/", value=f"http://{proxy.address}")]
    refused(enginewright("pull", pushed, "--out", tmp_path / "b"), 7, "redirects without end")
    proxy.faults = [Fault("redirect", "GET", "/blobs/", value="http://registry.example.org")]
    refused(enginewright("pull", pushed, "--out", tmp_path / "b"), 7, "without TLS")
    proxy.faults = [Fault("redirect", "GET", "/blobs/", value="file:///etc/passwd?")]
    refused(enginewright("pull", pushed, "--out", tmp_path / "b"), 7, "no way to a registry")
    clean(tmp_path / "b")


def login(folder: Path, monkeypatch: pytest.MonkeyPatch, host: str, password: str = "right") -> None:
    """What `docker login` leaves."""
    import base64

    place = folder / "docker"
    place.mkdir(exist_ok=True)
    auth = base64.b64encode(f"wright:{password}".encode()).decode()
    (place / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(place))


def test_a_registry_that_lies_about_digests(
    registry: Registry, proxy: Proxy, pushed: str, made: Path, tmp_path: Path
) -> None:
    lie = ("Docker-Content-Digest", f"sha256:{'1' * 64}")
    proxy.faults = [Fault("header", "GET", "/manifests/", value=lie)]
    refused(enginewright("pull", pushed, "--out", tmp_path), 6, "the registry says that 1.0.0 is sha256:1111")
    # Another manifest than the one that the digest names.
    proxy.faults = [Fault("body", "GET", "/manifests/sha256", value=b'{"schemaVersion":2,"manifests":[]}')]
    refused(enginewright("pull", pushed, "--out", tmp_path), 6, "asked for sha256:", "the registry gave")
    proxy.faults = [Fault("body", "GET", "/manifests/", value=b"<html>log in</html>")]
    refused(enginewright("pull", pushed, "--out", tmp_path), 6, "is not JSON")
    proxy.faults = [Fault("body", "GET", "/manifests/", value=b"[" * 100_000)]
    refused(enginewright("pull", pushed, "--out", tmp_path), 6, "is not JSON")
    proxy.faults = [Fault("body", "GET", "/manifests/", value=bytes(5 << 20))]
    refused(enginewright("pull", pushed, "--out", tmp_path), 6, "has more than")
    # What it claims to have stored.
    ref = pushed.replace(":1.0.0", "-other:1.0.0")
    proxy.faults = [Fault("header", "PUT", "/blobs/", value=lie)]
    refused(enginewright("push", made, ref), 6, "the registry stored sha256:1111")
    clean(tmp_path)


def test_a_disk_that_fills_up(pushed: str, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", 2 << 20) as place:
        refused(enginewright("pull", pushed, "--out", place / "out"), 3, "no space left", "--out", "gc")
        clean(place / "out")


def test_a_disk_that_fills_up_in_the_middle(pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system said was free is taken by somebody else meanwhile; what has arrived is used later."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with mounted(tmp_path / "small", 2 << 20) as place:
        refused(enginewright("pull", pushed, "--out", place / "out"), 3, "no space left", "what has arrived is kept")
        clean(place / "out")
        assert list((place / "out").rglob("*.partial"))
        refused(enginewright("copy", pushed, f"oci:{place}/layout"), 3, "no space left")
        refused(enginewright("copy", pushed, f"oci-archive:{place}/x.tar"), 3, "no space left")
        assert not list(place.glob("*x.tar*"))
        assert not list((place / "layout").rglob(".[0-9a-f]*"))


def test_errors_of_the_disk_are_told_as_such(pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stream: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(layout, "settle", broken)
    refused(enginewright("copy", pushed, f"oci:{tmp_path}/layout"), 3, "cannot be written")


def start(*argv: object) -> Running:
    """The installed command, in a process that can be killed."""
    return Running(["enginewright", *map(str, argv)], Path.cwd(), {"DOCKER_CONFIG": "/nonexistent"})


def test_kill_9_during_a_pull_then_only_the_rest_is_asked_for(proxy: Proxy, pushed: str, tmp_path: Path) -> None:
    proxy.faults = [Fault("slow", path=WEIGHT_DIGEST, value=700_000)]
    running = start("pull", pushed, "--out", tmp_path)
    partial = wait_for(lambda: list(tmp_path.rglob(f".{WEIGHT_DIGEST[7:]}.partial")), "a part is on the disk")[0]
    wait_for(lambda: partial.stat().st_size > 1_000_000, "a megabyte is there")
    running.signal(signal.SIGKILL)
    assert running.end().code == -signal.SIGKILL
    clean(tmp_path)
    proxy.faults, proxy.log = [], []
    done = ok("pull", pushed, "--out", tmp_path, "--format", "json").json
    (request,) = proxy.asked("GET", WEIGHT_DIGEST)
    assert int(request.headers["range"].removeprefix("bytes=").rstrip("-")) > 1_000_000
    assert done["fetched_bytes"] < len(WEIGHTS)
    assert examine(tmp_path / "tiny/cpu").ok
    assert not list(tmp_path.rglob("*.partial"))


def test_ctrl_c_during_a_pull(proxy: Proxy, pushed: str, tmp_path: Path) -> None:
    """It ends at the next block, not at the end of the file, and says so."""
    proxy.faults = [Fault("slow", path=WEIGHT_DIGEST, value=200_000)]
    running = start("pull", pushed, "--out", tmp_path)
    wait_for(lambda: list(tmp_path.rglob(f".{WEIGHT_DIGEST[7:]}.partial")), "a part is on the disk")
    started = time.monotonic()
    running.signal(signal.SIGINT)
    done = running.end()
    assert done.code == 130, done.err
    assert "interrupted" in done.err and "Traceback" not in done.err
    assert time.monotonic() - started < 12  # the whole file would take 15 s
    clean(tmp_path)


def test_a_part_that_was_damaged_is_fetched_anew(proxy: Proxy, pushed: str, tmp_path: Path) -> None:
    proxy.faults = [
        Fault("cut", path=WEIGHT_DIGEST, value=1_000_000, times=1),
        Fault("cut", path=WEIGHT_DIGEST, value=0),
    ]
    refused(enginewright("pull", pushed, "--out", tmp_path), 7)
    (partial,) = (path for path in tmp_path.rglob("*.partial") if WEIGHT_DIGEST[7:] in path.name)
    spoilt(partial, lambda data: data.__setitem__(10, data[10] ^ 1))
    proxy.faults = []
    ok("pull", pushed, "--out", tmp_path)
    assert examine(tmp_path / "tiny/cpu").ok


def test_kill_9_during_a_push(registry: Registry, proxy: Proxy, repository: str, made: Path, tmp_path: Path) -> None:
    proxy.faults = [Fault("slow", "PUT", "/blobs/uploads/", value=700_000)]
    ref = f"{proxy.address}/{repository}:1.0.0"
    running = start("push", made, ref)
    wait_for(lambda: any(r.received > 1_000_000 for r in proxy.asked("PUT")), "a megabyte was sent")
    running.signal(signal.SIGKILL)
    running.end()
    assert registry.tags(repository) == []
    proxy.faults = []
    ok("push", made, ref)
    ok("pull", ref, "--out", tmp_path)
    assert examine(tmp_path / "tiny/cpu").ok


def test_two_pulls_at_once(proxy: Proxy, pushed: str, tmp_path: Path) -> None:
    """Each byte is fetched once, and both end with the same whole artifact."""
    proxy.faults = [Fault("slow", path=WEIGHT_DIGEST, value=6_000_000)]
    running = [start("pull", pushed, "--out", tmp_path, "--format", "json") for _ in range(2)]
    done = [each.end() for each in running]
    assert [each.code for each in done] == [0, 0], [each.err for each in done]
    assert len({each.json["artifact_id"] for each in done}) == 1
    assert len(proxy.asked("GET", WEIGHT_DIGEST)) == 1
    assert sorted(each.json["changed"] for each in done) == [False, True]
    assert examine(tmp_path / "tiny/cpu").ok
    assert not [path for path in (tmp_path / "tiny").iterdir() if "assembling" in path.name or "previous" in path.name]


def test_many_push_the_same_at_once(registry: Registry, repository: str, made: Path, tmp_path: Path) -> None:
    """Attestations of each stay in the list, whoever wrote it last."""
    codes: list[int] = []
    ref = f"{registry.address}/{repository}:1.0.0"
    from pipeline.registry import places, push, reference

    def one() -> None:
        where = reference.parse(ref)
        with places.writing(where, tmp_path) as repo:
            push.push(push.prepare([made]), repo, where.tag)
        codes.append(0)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0, 0]
    ok("verify", ref)
    assert {row["parity"] for row in ok("ls", ref, "--format", "json").json} == {"passed", "deferred"}


def test_archives_from_outside(made: Path, tmp_path: Path) -> None:
    """A tar file is read in place: no member of it reaches the disk by its own name."""
    import io
    import tarfile

    ok("push", made, f"oci-archive:{tmp_path}/good.tar:1")
    good = (tmp_path / "good.tar").read_bytes()

    def with_member(name: str, kind: bytes, target: str = "") -> Path:
        place = tmp_path / "bad.tar"
        place.write_bytes(good)
        with tarfile.open(place, "a:") as tar:
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, target
            about.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(about, io.BytesIO(b"evil"))
        return place

    for name, kind, target in (
        ("../../evil", tarfile.REGTYPE, ""),
        ("/tmp/evil", tarfile.REGTYPE, ""),
        ("evil", tarfile.SYMTYPE, "/etc/passwd"),
    ):
        place = with_member(name, kind, target)
        ok("pull", f"oci-archive:{place}:1", "--out", tmp_path / "out" / str(len(name)), "--target", "cpu")
    assert not list(tmp_path.rglob("evil"))
    refused(enginewright("ls", f"oci-archive:{with_member('index.json', tarfile.REGTYPE)}"), 6, "stands twice")
    blob = f"blobs/sha256/{'0' * 64}"
    refused(
        enginewright("ls", f"oci-archive:{with_member(blob, tarfile.SYMTYPE, '/etc/passwd')}"), 6, "not a regular file"
    )
    (tmp_path / "bad.tar").write_bytes(good[: len(good) // 2])
    assert enginewright("pull", f"oci-archive:{tmp_path}/bad.tar:1").code in (6, 7)
    (tmp_path / "bad.tar").write_bytes(b"\x1f\x8b" + good)
    refused(enginewright("ls", f"oci-archive:{tmp_path}/bad.tar"), 6, "not a plain tar file")
