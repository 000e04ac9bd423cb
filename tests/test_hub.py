"""The hub through the real huggingface_hub against the stand-in: listing, download, and every error by its text."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from pipeline.errors import EnginewrightError, NetworkError, RecipeError, StageError, VerificationError
from pipeline.hub import client, explain
from pipeline.hub.download import download
from pipeline.hub.listing import RemoteFile, listing
from tests.hub import Fault, Hub, closed_port, git_blob, serving

ROOT = Path(__file__).parents[1]
WEIGHTS = bytes(range(256)) * 4096
"""1 MiB."""
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS, "1_Pooling/config.json": b"{}"}
LARGE = RemoteFile("model.safetensors", len(WEIGHTS), sha256=hashlib.sha256(WEIGHTS).hexdigest())
SMALL = RemoteFile("config.json", len(FILES["config.json"]), blob=git_blob(FILES["config.json"]))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, `org/tiny`; failures are repeated at once."""
    monkeypatch.setattr(explain, "BACKOFF_S", 0.001)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for hub in serving():
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.commit("org/tiny", FILES, "v1")
        yield hub


def refusal(kind: type[EnginewrightError], repo: str = "org/tiny", revision: str | None = None) -> str:
    """The whole text of the error that listing raises."""
    with pytest.raises(kind) as caught:
        listing(repo, revision)
    assert type(caught.value) is kind
    return str(caught.value)


def failed(kind: type[EnginewrightError], hub: Hub, place: Path, file: RemoteFile = LARGE) -> str:
    """The whole text of the error that a download raises."""
    with pytest.raises(kind) as caught:
        download("org/tiny", hub.repos["org/tiny"].refs["main"], file, place)
    assert type(caught.value) is kind
    return str(caught.value)


def bring(hub: Hub, place: Path, file: RemoteFile = LARGE) -> int:
    """Download; the sum of what progress was told."""
    told: list[int] = []
    digest = download("org/tiny", hub.repos["org/tiny"].refs["main"], file, place, told.append)
    assert digest == "sha256:" + hashlib.sha256(place.read_bytes()).hexdigest()
    assert place.read_bytes() == FILES[file.path]
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    return sum(told)


# Is the stand-in like the real hub? The library's own way through it is the judge.


def test_the_library_itself_is_content_with_the_stand_in(hub: Hub, tmp_path: Path) -> None:
    folder = Path(
        huggingface_hub.snapshot_download("org/tiny", endpoint=hub.endpoint, local_dir=tmp_path, revision="v1")
    )
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert hub.asked("config.json", "HEAD")


# Listing.


@pytest.mark.parametrize("revision", [None, "main", "v1"])
def test_a_name_becomes_a_commit(hub: Hub, revision: str | None) -> None:
    commit, files = listing("org/tiny", revision)
    assert commit == hub.repos["org/tiny"].refs["main"]
    assert len(commit) == 40
    assert {file.path: file.size for file in files} == {name: len(data) for name, data in FILES.items()}
    assert LARGE in files
    assert SMALL in files


def test_a_commit_stays_what_it_was(hub: Hub) -> None:
    first = hub.repos["org/tiny"].refs["main"]
    hub.commit("org/tiny", {**FILES, "config.json": b"{}"})
    assert listing("org/tiny", first)[0] == first
    assert listing("org/tiny", None)[0] != first
    assert listing("org/tiny", "v1")[0] == first


def test_no_such_repository(hub: Hub) -> None:
    assert refusal(RecipeError, "org/nothing") == (
        f"there is no model hf://org/nothing on {hub.endpoint}\n"
        "hint: check the name; if it is private, set HF_TOKEN to a token that may read it"
    )


def test_no_such_revision(hub: Hub) -> None:
    assert refusal(RecipeError, revision="v9") == (
        "hf://org/tiny has no revision 'v9'\nhint: after the @ stands a branch, tag or commit"
    )


def test_a_private_repository_needs_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"].private = True
    assert "there is no model hf://org/tiny" in refusal(RecipeError)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert len(listing("org/tiny", None)[1]) == 3


def test_a_wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refusal(NetworkError) == (
        f"{hub.endpoint} did not accept HF_TOKEN for hf://org/tiny (401)\nhint: make a new token, or unset it"
    )


def test_nobody_listens(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    assert refusal(NetworkError).startswith(f"{nowhere} cannot be reached: ")
    assert "hint: check the network, HTTPS_PROXY and HF_ENDPOINT" in refusal(NetworkError)


def test_no_such_host(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert "http://hub.invalid cannot be reached: " in refusal(NetworkError)


def test_an_endpoint_that_is_no_address(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    assert "hub.example cannot be reached: " in refusal(NetworkError)


def test_no_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults["api"] = Fault("slow", 0.3)
    assert refusal(NetworkError) == (
        f"{hub.endpoint} did not answer within 0.1 s, asked for hf://org/tiny\n"
        "hint: try again, or raise HF_HUB_DOWNLOAD_TIMEOUT (seconds)"
    )


def test_a_hub_that_is_ill_for_a_while(hub: Hub) -> None:
    hub.faults["api"] = Fault("status", 503, times=3)
    assert listing("org/tiny", None)[0] == hub.repos["org/tiny"].refs["main"]
    hub.faults["api"] = Fault("status", 502)
    assert "answered 502, asked for hf://org/tiny\nhint: try again later" in refusal(NetworkError)
    hub.faults["api"] = Fault("status", 429)
    assert "too many requests (429)" in refusal(NetworkError)


def test_a_broken_connection(hub: Hub) -> None:
    hub.faults["api"] = Fault("drop", times=2)
    assert listing("org/tiny", None)
    hub.faults["api"] = Fault("drop")
    assert f"the connection to {hub.endpoint} broke" in refusal(NetworkError)


def test_a_login_page_instead_of_the_hub(hub: Hub) -> None:
    hub.faults["api"] = Fault("html")
    assert f"{hub.endpoint} does not answer like a Hugging Face hub" in refusal(NetworkError)


def test_a_forbidden_repository(hub: Hub) -> None:
    hub.faults["api"] = Fault("status", 403)
    assert "does not let you read hf://org/tiny (403)" in refusal(NetworkError)


def test_a_name_that_the_hub_cannot_have(hub: Hub) -> None:
    assert "hint: write `hf://org/name` or `hf://org/name@revision`" in refusal(RecipeError, "org/a--b")


def test_the_library_is_told_to_be_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal(NetworkError) == "hf://org/tiny is needed, and HF_HUB_OFFLINE is set\nhint: unset HF_HUB_OFFLINE"


# Downloads.


@pytest.mark.parametrize("file", [SMALL, LARGE, RemoteFile("1_Pooling/config.json", 2, blob=git_blob(b"{}"))])
def test_a_download_is_verified_and_counted(hub: Hub, tmp_path: Path, file: RemoteFile) -> None:
    assert bring(hub, tmp_path / "in" / "place", file) == file.size


def test_the_token_stays_with_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    bring(hub, tmp_path / "place")
    with_token = {request.host.partition(":")[0]: "authorization" in request.headers for request in hub.requests}
    assert with_token == {"127.0.0.1": True, "localhost": False}


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = Fault("drop", 300_000, times=3)
    assert bring(hub, tmp_path / "place") == len(WEIGHTS)
    ranges = [request.headers.get("range") for request in hub.asked("model.safetensors") if "/cdn/" in request.path]
    assert ranges == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_polite_but_short_answer_goes_on_too(hub: Hub, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = Fault("short", 1000, times=1)
    assert bring(hub, tmp_path / "place") == len(WEIGHTS)


def test_a_download_that_gets_nowhere_ends(hub: Hub, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = Fault("drop", 0)
    text = failed(NetworkError, hub, tmp_path / "place")
    assert f"the connection to {hub.endpoint} broke, asked for model.safetensors of hf://org/tiny" in text
    assert text.endswith("hint: run the command again: it goes on where it stopped")
    assert len([r for r in hub.asked("model.safetensors") if "/cdn/" in r.path]) == explain.ATTEMPTS


def test_a_server_without_ranges_is_not_asked_for_ever(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.faults["model.safetensors"] = Fault("drop", 300_000, times=2)
    assert bring(hub, tmp_path / "place") == len(WEIGHTS)
    (tmp_path / "place").unlink()
    hub.faults["model.safetensors"] = Fault("drop", 300_000)
    failed(NetworkError, hub, tmp_path / "place")


def test_another_run_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = Fault("drop", 400_000, times=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "ATTEMPTS", 1)
        failed(NetworkError, hub, tmp_path / "place")
    assert (tmp_path / "place.partial").stat().st_size == 400_000
    assert not (tmp_path / "place").exists()
    hub.requests.clear()
    assert bring(hub, tmp_path / "place") == len(WEIGHTS)
    assert hub.asked("model.safetensors")[0].headers["range"] == "bytes=400000-"


def test_a_killed_run_is_resumed(hub: Hub, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from pipeline.hub.download import download\n"
        "from pipeline.hub.listing import RemoteFile\n"
        f"file = RemoteFile('model.safetensors', {LARGE.size}, sha256='{LARGE.sha256}')\n"
        "def slowly(size): print(size, flush=True); time.sleep(0.05)\n"
        f"download('org/tiny', '{hub.repos['org/tiny'].refs['main']}', file, Path('place'), slowly)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=env, stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(4):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    left = (tmp_path / "place.partial").stat().st_size
    assert 0 < left < len(WEIGHTS)
    hub.requests.clear()
    bring(hub, tmp_path / "place")
    assert hub.asked("model.safetensors")[0].headers["range"] == f"bytes={left}-"


@pytest.mark.parametrize("left", [b"\0" * 1000, WEIGHTS + b"too long", b"\0" * len(WEIGHTS)])
def test_a_wrong_part_from_an_earlier_run_is_overcome(hub: Hub, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "place.partial").write_bytes(left)
    assert bring(hub, tmp_path / "place") == len(WEIGHTS)


def test_a_damaged_file_in_its_place_is_replaced(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "place").write_bytes(WEIGHTS[:-1] + b"x")
    assert bring(hub, tmp_path / "place") == len(WEIGHTS)
    hub.requests.clear()
    assert bring(hub, tmp_path / "place") == len(WEIGHTS)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "expected"), [(LARGE, f"sha256:{LARGE.sha256}"), (SMALL, f"git blob {SMALL.blob}")], ids=["lfs", "git"]
)
def test_wrong_bytes(hub: Hub, tmp_path: Path, file: RemoteFile, expected: str) -> None:
    hub.faults[file.path] = Fault("bytes", 5)
    text = failed(VerificationError, hub, tmp_path / "place", file)
    commit = hub.repos["org/tiny"].refs["main"]
    assert text.startswith(
        f"{file.path} of hf://org/tiny at {commit[:12]} is not what the hub announced: expected {expected}, got "
    )
    assert "it was deleted\nhint: run the command again" in text
    assert list(tmp_path.iterdir()) == []


def test_a_gated_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"].gated = True
    assert listing("org/tiny", None)  # the real hub lists a gated model, too
    advice = f"\nhint: accept its licence at {hub.endpoint}/org/tiny, then set HF_TOKEN to a token of that account"
    text = failed(NetworkError, hub, tmp_path / "place")
    assert text == "hf://org/tiny is gated: its owner has not let you in (401)" + advice
    monkeypatch.setenv("HF_TOKEN", hub.token)
    text = failed(NetworkError, hub, tmp_path / "place")
    assert text == "hf://org/tiny is gated: its owner has not let you in (403)" + advice


def test_what_was_pinned_is_gone(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="hf://org/tiny has lost its commit 0123"):
        download("org/tiny", "0123" * 10, LARGE, tmp_path / "place")
    with pytest.raises(NetworkError, match=r"hf://org/tiny at \w{40} has no other\.json any more"):
        download("org/tiny", hub.repos["org/tiny"].refs["main"], RemoteFile("other.json", 5), tmp_path / "place")
    with pytest.raises(NetworkError, match=r"hf://org/gone is not on .* any more, or has become private"):
        download("org/gone", "0123" * 10, LARGE, tmp_path / "place")


def test_an_ill_server_ends_with_its_status(hub: Hub, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = Fault("status", 503, times=2)
    bring(hub, tmp_path / "place")
    (tmp_path / "place").unlink()
    hub.faults["model.safetensors"] = Fault("status", 500)
    assert "answered 500, asked for model.safetensors of hf://org/tiny" in failed(NetworkError, hub, tmp_path / "place")


def test_silence_in_a_download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults["config.json"] = Fault("slow", 0.3)
    assert "did not answer within 0.1 s, asked for config.json of" in failed(NetworkError, hub, tmp_path / "p", SMALL)


def test_a_disk_that_is_too_small(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1234))  # type: ignore[attr-defined]
    text = failed(StageError, hub, tmp_path / "place")
    assert text.startswith(f"no space left for {tmp_path / 'place'}: 1,048,576 bytes needed, 1,234 bytes free\nhint: ")
    assert hub.requests == []


def test_a_disk_that_fills_up(hub: Hub, small_disk: Path) -> None:
    place = small_disk / "place"
    with pytest.MonkeyPatch.context() as patch:  # as if another process took the rest after the look at the disk
        usage = shutil.disk_usage
        patch.setattr(shutil, "disk_usage", lambda path: usage("/") if not hub.requests else usage(path))
        text = failed(StageError, hub, place)
    assert text.startswith(f"no space left for {place}: ")
    assert 0 < (small_disk / "place.partial").stat().st_size < len(WEIGHTS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"may not mount: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_two_that_want_one_file_download_it_once(hub: Hub, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = Fault("slow", 0.2, times=1)
    commit = hub.repos["org/tiny"].refs["main"]
    with ThreadPoolExecutor(4) as pool:
        wanted = [pool.submit(download, "org/tiny", commit, LARGE, tmp_path / "place") for _ in range(4)]
        assert {each.result() for each in wanted} == {f"sha256:{LARGE.sha256}"}
    assert (tmp_path / "place").read_bytes() == WEIGHTS
    assert len([r for r in hub.asked("model.safetensors") if "/cdn/" in r.path]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_the_hub_is_asked_for_nothing_else(hub: Hub, tmp_path: Path) -> None:
    """In a fresh process: no telemetry, no registry of agents, no second storage protocol."""
    script = (
        "import os; from pathlib import Path\n"
        "from pipeline.hub.download import download; from pipeline.hub.listing import listing\n"
        "commit, files = listing('org/tiny', None)\n"
        "[download('org/tiny', commit, file, Path(str(n))) for n, file in enumerate(files)]\n"
        "import huggingface_hub.constants as c; assert c.HF_HUB_DISABLE_TELEMETRY and c.HF_HUB_DISABLE_XET"
    )
    unset = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True)
    commit = hub.repos["org/tiny"].refs["main"]
    paths = [request.path for request in hub.requests]
    assert paths[0] == "/api/models/org/tiny?blobs=true"
    assert all(path.startswith((f"/org/tiny/resolve/{commit}/", "/cdn/")) for path in paths[1:])
    assert len(paths) == 5  # the listing, three files, one of them redirected
    assert not (tmp_path / "home").exists()


def test_both_generations_of_the_http_client_have_what_is_used() -> None:
    http = client.http_package()
    for name in ("TransportError", "ConnectError", "TimeoutException", "UnsupportedProtocol"):
        assert issubclass(getattr(http, name), Exception)
