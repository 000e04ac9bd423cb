"""Against a real registry: what goes in comes out, is not sent twice, survives its collector, and moves unchanged."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import hardware
from pipeline.artifact.verify import examine
from pipeline.hardware import Device
from tests.registry.door import WEIGHTS, artifacts, enginewright, ok, refused
from tests.registry.proxy import Proxy
from tests.registry.server import Registry, program


def test_two_targets_are_pushed_and_this_machine_gets_its_own(
    proxy: Proxy, registry: Registry, repository: str, made: Path, tmp_path: Path
) -> None:
    ref = f"{proxy.address}/{repository}:1.0.0"
    pushed = ok("push", made, ref, "--format", "json").json
    assert pushed["tag"] == "1.0.0" and set(pushed["targets"]) == {"cpu", "cuda-sm90"}
    assert pushed["sent"]["size_bytes"] > len(WEIGHTS)
    assert pushed["reference"] == f"{ref}@{pushed['digest']}"
    done = ok("pull", ref, "--out", tmp_path, "--format", "json").json
    assert done["target"] == "cpu"
    assert done["artifact_id"] == pushed["targets"]["cpu"]
    assert [(fit["target"], fit["rank"]) for fit in done["fits"]] == [("cpu", "portable"), ("cuda-sm90", "no")]
    assert "CUDA device" in done["fits"][1]["reason"]
    here = tmp_path / "tiny" / "cpu"
    assert examine(here).ok
    for path in sorted((made / "cpu").rglob("*")):
        if path.is_file():
            assert (here / path.relative_to(made / "cpu")).read_bytes() == path.read_bytes()
    assert not (tmp_path / "tiny" / "cuda-sm90").exists()
    # Only the winner's files were fetched.
    layers = {layer["digest"] for layer in registry.manifest(repository, "1.0.0-cuda-sm90")["layers"]}
    mine = {layer["digest"] for layer in registry.manifest(repository, "1.0.0-cpu")["layers"]}
    other = [r.path for r in proxy.asked("GET", "/blobs/") if r.path.rpartition("/")[2] in layers - mine]
    assert len(other) == 1  # manifest.json of the other target, by which it was judged
    # Again: nothing is fetched, nothing is written.
    before = (here / "model.onnx").stat()
    again = ok("pull", ref, "--out", tmp_path, "--format", "json").json
    assert again["changed"] is False and again["fetched_bytes"] == 0
    assert (here / "model.onnx").stat().st_ino == before.st_ino


def test_a_second_push_sends_nothing(proxy: Proxy, repository: str, made: Path) -> None:
    ref = f"{proxy.address}/{repository}"
    first = ok("push", made, ref, "--format", "json").json
    proxy.log.clear()
    second = ok("push", made, ref, "--format", "json").json
    assert second["digest"] == first["digest"]
    assert second["sent"]["blobs"] == second["sent"]["manifests"] == second["attested"] == 0
    assert proxy.log and not proxy.asked("PUT|POST|PATCH")
    assert sum(request.received for request in proxy.log) == 0


def test_equal_content_has_equal_digests_everywhere(
    registry: Registry, repository: str, made: Path, tmp_path: Path
) -> None:
    other = artifacts(tmp_path / "other")
    one = ok("push", made, f"{registry.address}/{repository}:a", "--format", "json").json
    two = ok("push", other, f"oci:{tmp_path / 'layout'}:b", "--format", "json").json
    assert one["digest"] == two["digest"] and one["children"] == two["children"]


def test_the_collector_deletes_nothing_of_ours(own_registry: Registry, made: Path, tmp_path: Path) -> None:
    ref = f"{own_registry.address}/models/tiny:1.0.0"
    ok("keygen", tmp_path / "key")
    ok("push", made, ref)
    assert "0 blobs and 0 manifests eligible for deletion" in own_registry.collect()
    ok("sign", ref, "--key", tmp_path / "key.key")
    before = ok("ls", ref, "--format", "json").json, own_registry.tags("models/tiny")
    # The two lists of attestations that signing replaced are rubbish, and nothing else is.
    assert "2 manifests eligible for deletion" in own_registry.collect()
    assert (ok("ls", ref, "--format", "json").json, own_registry.tags("models/tiny")) == before
    ok("verify", ref, "--key", tmp_path / "key.pub", "--plain-http")
    assert ok("pull", ref, "--out", tmp_path, "--key", tmp_path / "key.pub").code == 0
    # The collector does collect: a manifest without a tag is gone after it.
    layer = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}
    manifest = own_registry.manifest("models/tiny", "1.0.0-cpu") | layer | {"annotations": {"x": "y"}}
    data = json.dumps(manifest).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    kind = "application/vnd.oci.image.manifest.v1+json"
    assert own_registry.ask("PUT", f"/v2/models/tiny/manifests/{digest}", data, kind)[0] == 201
    assert "1 manifests eligible" in own_registry.collect()


def test_skopeo_copies_it_with_the_digest_unchanged(
    registry: Registry, repository: str, made: Path, tmp_path: Path
) -> None:
    skopeo = program("skopeo")
    digest = ok("push", made, f"{registry.address}/{repository}", "--format", "json").json["digest"]
    goal = f"docker://{registry.address}/{repository}-copy:1.0.0"
    flags = ["--all", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"]
    source = f"docker://{registry.address}/{repository}:1.0.0"
    subprocess.run([skopeo, "copy", "--quiet", *flags, source, goal], check=True)
    raw = subprocess.run([skopeo, "inspect", "--raw", "--tls-verify=false", goal], capture_output=True, check=True)
    assert f"sha256:{hashlib.sha256(raw.stdout).hexdigest()}" == digest
    # And out of a layout and a tar file of ours.
    ok("copy", f"{registry.address}/{repository}:1.0.0", f"oci:{tmp_path}/layout:1.0.0")
    ok("copy", f"oci:{tmp_path}/layout:1.0.0", f"oci-archive:{tmp_path}/model.tar:1.0.0")
    for source in (f"oci:{tmp_path}/layout:1.0.0", f"oci-archive:{tmp_path}/model.tar:1.0.0"):
        goal = f"docker://{registry.address}/{repository}-{source.partition(':')[0]}:1.0.0"
        subprocess.run([skopeo, "copy", "--quiet", *flags[:2], flags[3], source, goal], check=True)
        done = ok(
            "pull", goal.removeprefix("docker://"), "--out", tmp_path / goal.rpartition("-")[2], "--format", "json"
        )
        assert done.json["reference"].endswith(digest)


def test_a_layout_that_skopeo_wrote_is_read(registry: Registry, repository: str, made: Path, tmp_path: Path) -> None:
    skopeo = program("skopeo")
    digest = ok("push", made, f"{registry.address}/{repository}", "--format", "json").json["digest"]
    source = f"docker://{registry.address}/{repository}:1.0.0"
    for goal in (f"oci:{tmp_path}/layout:1.0.0", f"oci-archive:{tmp_path}/model.tar:1.0.0"):
        subprocess.run([skopeo, "copy", "--quiet", "--all", "--src-tls-verify=false", source, goal], check=True)
        assert digest in ok("verify", goal, "--format", "json").json["reference"]


def test_promote_moves_no_byte_and_keeps_everything(proxy: Proxy, repository: str, made: Path, tmp_path: Path) -> None:
    ok("keygen", tmp_path / "key", "--kind", "p256")
    source, goal = f"{proxy.address}/{repository}:1.0.0", f"{proxy.address}/{repository}-prod:stable"
    digest = ok("push", made, source, "--format", "json").json["digest"]
    ok("sign", source, "--key", tmp_path / "key.key")
    before = ok("verify", source, "--format", "json", "--key", tmp_path / "key.pub").json
    refused(enginewright("promote", source, goal), 4, "cuda-sm90: deferred", "parity", "--allow-deferred")
    refused(enginewright("ls", goal), 7, "is not there")
    proxy.log.clear()
    done = ok("promote", source, goal, "--allow-deferred", "--key", tmp_path / "key.pub", "--format", "json").json
    assert done["digest"] == digest and done["blobs"] == 0 and done["mounted"] > 0
    assert {each["target"]: each["parity"] for each in done["targets"]} == {"cpu": "passed", "cuda-sm90": "deferred"}
    assert not [r for r in proxy.asked("PUT", "/blobs/") if r.received]
    after = ok("verify", goal, "--format", "json", "--key", tmp_path / "key.pub").json
    assert after["targets"] == before["targets"]
    # Within a repository it is another name for the same thing.
    ok("promote", goal, f"{proxy.address}/{repository}-prod:live", "--allow-deferred")
    assert digest in ok("ls", f"{proxy.address}/{repository}-prod").out
    # A tag that stands for something else is not moved by accident.
    newer = artifacts(tmp_path / "new", version="1.1.0")
    ok("push", newer, f"{proxy.address}/{repository}:1.1.0")
    again = ("promote", f"{proxy.address}/{repository}:1.1.0", goal, "--allow-deferred")
    refused(enginewright(*again), 7, "stands for", "--force-tag")
    ok(*again, "--force-tag")


def test_a_failed_proof_is_never_promoted(registry: Registry, repository: str, tmp_path: Path) -> None:
    made = artifacts(tmp_path / "made")
    path = made / "cuda-sm90" / ".attest" / "parity.json"
    path.write_text(path.read_text().replace('"WARNED"', '"FAILED"').replace('"deferred"', '"failed"'))
    ref = f"{registry.address}/{repository}:1.0.0"
    ok("push", made, ref)
    done = enginewright("promote", ref, f"{registry.address}/{repository}-prod:1.0.0", "--allow-deferred")
    refused(done, 4, "cuda-sm90: failed (parity.json)")
    assert registry.tags(f"{repository}-prod") == []


def test_a_version_does_not_change_behind_its_users_back(registry: Registry, repository: str, tmp_path: Path) -> None:
    made, other = artifacts(tmp_path / "a"), artifacts(tmp_path / "b", weights=WEIGHTS[::-1])
    ref = f"{registry.address}/{repository}"
    first = ok("push", made, ref, "--format", "json").json["digest"]
    refused(enginewright("push", other, ref), 7, "another 'cpu' already", "--force-tag")
    refused(enginewright("push", made / "cpu", ref), 7, "stands for cuda-sm90 already", "--add")
    assert registry.manifest(repository, "1.0.0")["manifests"][0]["annotations"]
    assert ok("ls", ref, "--format", "json").json[0]["digest"] == first
    ok("push", other, ref, "--force-tag")
    assert ok("ls", ref, "--format", "json").json[0]["digest"] != first


def test_targets_are_added_from_other_machines(registry: Registry, repository: str, made: Path, tmp_path: Path) -> None:
    ref = f"{registry.address}/{repository}"
    ok("push", made / "cpu", ref)
    ok("push", made / "cuda-sm90", ref, "--add")
    both = ok("push", made, f"oci:{tmp_path / 'layout'}", "--format", "json").json
    (row,) = ok("ls", ref, "--format", "json").json
    assert row["targets"] == ["cpu", "cuda-sm90"] and row["digest"] == both["digest"]


def test_air_gap_and_back(registry: Registry, repository: str, made: Path, tmp_path: Path) -> None:
    """Registry -> tar -> layout -> registry: digests, targets and attestations as they were, and the tar is stable."""
    ok("keygen", tmp_path / "key")
    ref = f"{registry.address}/{repository}:1.0.0"
    digest = ok("push", made, ref, "--format", "json").json["digest"]
    ok("sign", ref, "--key", tmp_path / "key.key")
    files = []
    for name in ("one", "two"):
        ok("copy", ref, f"oci-archive:{tmp_path}/{name}.tar")
        files.append((tmp_path / f"{name}.tar").read_bytes())
    assert files[0] == files[1]
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert all(member.isreg() and not member.mtime for member in tar)
    ok("copy", f"oci-archive:{tmp_path}/one.tar:1.0.0", f"oci:{tmp_path}/layout")
    ok("copy", f"oci:{tmp_path}/layout:1.0.0", f"{registry.address}/{repository}-far:1.0.0")
    done = ok(
        "verify", f"{registry.address}/{repository}-far:1.0.0", "--key", tmp_path / "key.pub", "--format", "json"
    ).json
    assert done["reference"].endswith(digest)
    assert registry.tags(f"{repository}-far") == registry.tags(repository)
    ok("pull", f"oci:{tmp_path}/layout:1.0.0", "--out", tmp_path / "pulled", "--key", tmp_path / "key.pub")


def test_the_local_registry(registry: Registry, repository: str, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifacts"
    ok("pull", f"{registry_with(registry, repository, made)}:1.0.0", "--out", out)
    ok("push", made, "local:tiny:mine", "--out", out)
    rows = {row["version"]: row for row in ok("ls", "--out", out, "--format", "json").json}
    assert set(rows) == {"1.0.0-cpu", "mine"}
    assert "removed 0 files" in ok("gc", "--out", out).out
    # A pull from it needs no network, and links.
    ok("pull", "local:tiny:mine", "--target", "cpu", "--out", out)
    assert (out / "tiny/cpu/model.onnx").stat().st_nlink == 2
    ok("gc", "--out", out, "--remove", "local:tiny:mine")
    assert {row["version"] for row in ok("ls", "--out", out, "--format", "json").json} == {"1.0.0-cpu"}
    ok("verify", "local:tiny:1.0.0-cpu", "--out", out)
    done = ok("gc", "--out", out, "--remove", "local:tiny:1.0.0-cpu").out
    assert "removed" in done and "removed 0" not in done
    assert not list((out / ".registry/tiny/blobs/sha256").iterdir())
    assert examine(out / "tiny/cpu").ok
    refused(enginewright("pull", "local:tiny:mine", "--out", out), 7, "is not there")
    # What was collected comes back from the artifact, without the network's help.
    again = ok("pull", f"{registry.address}/{repository}:1.0.0", "--out", out, "--format", "json").json
    assert again["fetched_bytes"] == 0 and not again["changed"]
    ok("verify", "local:tiny:1.0.0-cpu", "--out", out)


def registry_with(registry: Registry, repository: str, made: Path) -> str:
    """The reference of a repository that has them."""
    ok("push", made, f"{registry.address}/{repository}")
    return f"{registry.address}/{repository}"


def test_a_pull_is_not_collected_under_its_feet(tmp_path: Path, made: Path) -> None:
    from pipeline.registry import places

    ok("push", made, "local:tiny:1", "--out", tmp_path)
    with places.local(tmp_path, "tiny").using():
        done = ok("gc", "--out", tmp_path, "--remove", "local:tiny:1")
        assert "in use" in done.err and "removed 0 files" in done.out
    assert "removed 0" not in ok("gc", "--out", tmp_path).out


H100 = Device("cuda", "NVIDIA H100", "9.0", 80 << 30, "550.54")


@pytest.mark.parametrize(
    ("device", "chosen"),
    [((), "cpu"), ((H100,), "cuda-sm90"), ((replace(H100, compute_capability="8.0"),), "cpu")],
)
def test_the_hardware_decides(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: tuple[Device, ...], chosen: str
) -> None:
    ok("push", made, f"oci:{tmp_path}/layout:1")
    machine = replace(hardware.probe(), devices=device)
    monkeypatch.setattr(hardware, "probe", lambda: machine)
    done = ok("pull", f"oci:{tmp_path}/layout:1", "--dry-run", "--format", "json").json
    assert done["target"] == chosen
    assert not (tmp_path / "tiny").exists()


def test_a_profile_decides_for_another_machine(made: Path, tmp_path: Path) -> None:
    ok("push", made, f"oci:{tmp_path}/layout:1")
    source = f"oci:{tmp_path}/layout:1"
    assert ok("pull", source, "--hardware", "h100", "--out", tmp_path, "--format", "json").json["target"] == "cuda-sm90"
    assert examine(tmp_path / "tiny" / "cuda-sm90").ok
    refused(enginewright("pull", source, "--hardware", "h10"), 64, "did you mean")


def test_nothing_fits(made: Path, tmp_path: Path) -> None:
    ok("push", made / "cuda-sm90", f"oci:{tmp_path}/layout:1")
    source = f"oci:{tmp_path}/layout:1"
    done = enginewright("pull", source, "--out", tmp_path)
    refused(done, 5, "no target of", "cuda-sm90: needs a CUDA device", "--target")
    assert not (tmp_path / "tiny").exists()
    ok("pull", source, "--out", tmp_path, "--target", "cuda-sm90")
    refused(enginewright("pull", source, "--target", "npu"), 64, "no target 'npu'", "there are: cuda-sm90")


def test_links_that_were_written_to_are_not_trusted(
    registry: Registry, repository: str, made: Path, tmp_path: Path
) -> None:
    """An artifact's file is a link into the local registry: what is changed there is fetched again, not spread."""
    ref = f"{registry_with(registry, repository, made)}:1.0.0"
    ok("pull", ref, "--out", tmp_path)
    file = tmp_path / "tiny/cpu/model.onnx"
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.write(b"\xff")
    done = ok("pull", ref, "--out", tmp_path, "--format", "json").json
    assert done["changed"] and done["fetched_bytes"] >= len(WEIGHTS)
    assert examine(tmp_path / "tiny/cpu").ok


def test_somebodys_folder_is_not_replaced(made: Path, tmp_path: Path) -> None:
    ok("push", made, f"oci:{tmp_path}/layout:1")
    thesis = tmp_path / "out/tiny/cpu/thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    refused(enginewright("pull", f"oci:{tmp_path}/layout:1", "--out", tmp_path / "out"), 3, "is not an artifact")
    assert thesis.read_text() == "years of work"


def test_a_damaged_artifact_is_not_pushed(registry: Registry, repository: str, made: Path, tmp_path: Path) -> None:
    bad = tmp_path / "cpu"
    shutil.copytree(made / "cpu", bad)
    file = bad / "model.onnx"
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    refused(
        enginewright("push", bad, f"{registry.address}/{repository}"), 6, str(file), "is not what its manifest says"
    )
    file.write_bytes(data[:-1])
    refused(enginewright("push", bad, f"{registry.address}/{repository}"), 6, "model.onnx", "bytes")
    assert registry.tags(repository) == []


def test_ways_to_say_it_wrong(made: Path, tmp_path: Path) -> None:
    for words, told in (
        (("push", made, "Upper/case"), "names no registry"),
        (("push", made, "localhost:5000/Upper"), "lower-case"),
        (("push", made), "push needs artifacts and where to"),
        (("push", tmp_path, "localhost:5000/x"), "holds no artifact"),
        (("push", made, f"localhost:5000/x@sha256:{'0' * 64}"), "a digest cannot be pushed to"),
        (("pull", "localhost:5000/x:bad tag"), "is not a tag"),
        (("pull", "ftp://host/x"), "no way to a registry"),
        (("pull", f"localhost:5000/x@sha256:{'0' * 63}"), "64 hex digits"),
        (("pull", "http://registry.example.org/x:1"), "in the clear"),
        (("copy", f"oci:{tmp_path}/none:1", "oci:x:1"), "is not there"),
    ):
        done = enginewright(*words)
        assert done.code in (64, 7), (words, done)
        assert told in done.err, (words, done.err)
