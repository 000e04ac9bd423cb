"""Pinning local folders and hub models: the lock, `--locked`, `--offline`, `--update`, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import digest
from pipeline.digest import sha256_file
from pipeline.errors import EnginewrightError, NetworkError, RecipeError, UnavailableError
from pipeline.hub import explain
from pipeline.pin import Locked, pin
from pipeline.plain import from_plain, to_plain
from pipeline.recipe import Data, Model, Parity, Recipe
from pipeline.stages.fetch import FetchOptions
from tests.hub import Fault, Hub, closed_port, serving

ROOT = Path(__file__).parents[1]
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "README.md": b"words",
}


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    """A model folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def recipe(source: str = "model", **more: Any) -> Recipe:
    """A recipe without targets."""
    return Recipe(name="tiny", model=Model(source=source), targets={}, **more)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A place with a model folder and data; the recipe is `tiny.yaml` in it."""
    write(tmp_path / "model")
    (tmp_path / "held.txt").write_text("held out\n")
    (tmp_path / "some.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path


def pinned(here: Path, wanted: Recipe | None = None, **how: Any) -> Locked:
    """Pin with a cache of its own."""
    return pin(wanted or recipe(), here / "tiny.yaml", cache=here / "cache", **how)


def refusal(kind: type[EnginewrightError], here: Path, wanted: Recipe | None = None, **how: Any) -> str:
    """The whole text of the error."""
    with pytest.raises(kind) as caught:
        pinned(here, wanted, **how)
    assert type(caught.value) is kind
    return str(caught.value)


def key(locked: Locked, role: str = "model") -> Any:
    """What of the fetch step enters its key."""
    return to_plain(locked.step(role).options, keyed=True)


# Local folders.


def test_a_local_folder(here: Path) -> None:
    locked = pinned(here)
    assert [(file.path, file.size, file.digest) for file in locked.model.files] == [
        (name, len(FILES[name]), sha256_file(here / "model" / name))
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    assert locked.model.uri == "model"
    assert locked.model.revision is None
    assert locked.model.location == str(here / "model")
    assert locked.config == {"model_type": "llama"}
    assert locked.data == {}
    assert locked.note == ""


def test_the_options_survive_the_job_file(here: Path) -> None:
    options = pinned(here).step("model").options
    assert from_plain(FetchOptions, json.loads(json.dumps(to_plain(options)))) == options
    assert set(to_plain(options, keyed=True)) == {"files"}


def test_the_key_is_the_contents(here: Path) -> None:
    before = pinned(here)
    (here / "model").rename(here / "elsewhere")
    after = pinned(here, recipe("elsewhere"))
    assert key(before) == key(after)
    assert key(pinned(here, recipe(str(here / "elsewhere")))) == key(before)
    (here / "elsewhere" / "README.md").write_text("other words")
    assert key(pinned(here, recipe("elsewhere"))) == key(before)
    (here / "elsewhere" / "tokenizer.json").write_text("{ }")
    assert key(pinned(here, recipe("elsewhere"))) != key(before)


def test_a_folder_of_links_is_a_folder(here: Path) -> None:
    snapshot = here / "snapshot"
    snapshot.mkdir()
    for number, name in enumerate(FILES):
        (here / f"blob{number}").write_bytes(FILES[name])
        (snapshot / name).symlink_to(f"../blob{number}")
    assert key(pinned(here, recipe("snapshot"))) == key(pinned(here))
    (here / "blob1").unlink()
    text = refusal(RecipeError, here, recipe("snapshot"))
    assert text.startswith("snapshot/model.safetensors is a link to nowhere (../blob1)")


def test_data_files(here: Path) -> None:
    wanted = recipe(calibration=Data(path="held.txt"), parity=Parity(data=Data(path="held.txt"), prompts="some.jsonl"))
    locked = pinned(here, wanted)
    stored = {role: [file.path for file in source.files] for role, source in locked.data.items()}
    assert stored == {"calibration": ["data.txt"], "parity-data": ["data.txt"], "prompts": ["data.jsonl"]}
    assert locked.data["prompts"].uri == "some.jsonl"
    assert locked.data["prompts"].location == str(here / "some.jsonl")
    assert locked.step("parity-data").name == "parity-data"
    before = key(locked, "calibration")
    (here / "held.txt").rename(here / "other.text")
    assert key(pinned(here, recipe(calibration=Data(path="other.text"))), "calibration") == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.txt", "none.txt does not exist\nhint: paths are relative to the folder of the recipe"),
        ("empty.txt", "empty.txt: the calibration file is empty\nhint: "),
        ("table.csv", "table.csv: the calibration file has the suffix '.csv'\nhint: known are .jsonl, .md, "),
        ("folder.txt", "folder.txt is not a regular file"),
        ("pipe.txt", "pipe.txt is not a regular file"),
    ],
)
def test_bad_data_files(here: Path, name: str, text: str) -> None:
    (here / "empty.txt").touch()
    (here / "table.csv").write_text("1,2")
    (here / "folder.txt").mkdir()
    os.mkfifo(here / "pipe.txt")
    assert refusal(RecipeError, here, recipe(calibration=Data(path=name))).startswith(text)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nowhere", "there is no folder nowhere\nhint: "),
        ("org/name", "there is no folder org/name\nhint: for the Hugging Face hub write hf://org/name"),
        ("held.txt", "held.txt is a file, not a folder\nhint: "),
        ("empty", "empty is empty\nhint: "),
        ("hf://name", "model.source cannot be 'hf://name'\nhint: write `hf://org/name` or `hf://org/name@revision`"),
        ("hf://org/name@", "model.source cannot be 'hf://org/name@'"),
        ("package://../x", "model.source cannot be 'package://../x'\nhint: write package://name/folder"),
        ("pointer", "pointer/model.safetensors has no weights\nhint: it is a Git LFS pointer: run `git lfs pull`"),
        ("broken", "broken/config.json:2:3: not valid JSON: "),
        ("pickle", "pickle has its weights as pickle (pytorch_model.bin)"),
    ],
)
def test_bad_models(here: Path, source: str, text: str) -> None:
    (here / "empty").mkdir()
    write(
        here / "pointer", FILES | {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}
    )
    write(here / "broken", FILES | {"config.json": b"{\n  oops\n}"})
    write(here / "pickle", {"config.json": b"{}", "pytorch_model.bin": b""})
    assert refusal(RecipeError, here, recipe(source)).startswith(text)
    assert not (here / "tiny.lock").exists()


def test_odd_file_names(here: Path) -> None:
    (here / "model" / os.fsdecode(b"picture-\xff.png")).touch()
    pinned(here)  # does not count
    (here / "model" / os.fsdecode(b"vocab-\xff.json")).touch()
    assert refusal(RecipeError, here).startswith("model: the file name 'vocab-\\udcff.json' is not UTF-8")


def test_a_recipe_in_a_folder_with_an_odd_name(here: Path) -> None:
    odd = here / os.fsdecode(b"ordner \xff \xc3\xa4")
    odd.mkdir()
    (here / "model").rename(odd / "model")
    assert [file.path for file in pinned(odd).model.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (odd / "tiny.lock").exists()


def test_a_model_inside_a_package(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "carrier").mkdir()
    (here / "carrier" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (here / "model").rename(here / "carrier" / "model")
    monkeypatch.syspath_prepend(str(here))
    locked = pinned(here, recipe("package://carrier/model"))
    assert locked.model.uri == "package://carrier/model"
    assert locked.model.location == str(here / "carrier" / "model")
    text = refusal(UnavailableError, here, recipe("package://not_a_package/model"))
    assert text.endswith("the Python package not_a_package is not installed\nhint: pip install not-a-package")


def test_a_large_model_is_read_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (here / "model").iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
    first = pinned(here)

    def no(path: Path) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(digest, "sha256_file", no)
    assert pinned(here) == first


def test_planning_imports_nothing_heavy(here: Path) -> None:
    pinned(here)
    script = (
        "import sys; from pathlib import Path; from pipeline.pin import pin; from pipeline.recipe import *\n"
        "pin(Recipe(name='t', model=Model(source='model'), targets={}), Path('tiny.yaml'), cache=Path('cache'))\n"
        "heavy = {'huggingface_hub', 'numpy', 'torch', 'onnx', 'httpx2', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


# The lock.


def test_the_lock_of_local_files(here: Path) -> None:
    pinned(here, recipe(str(here / "model"), calibration=Data(path="held.txt")))
    text = (here / "tiny.lock").read_text()
    assert str(here) not in text
    content = json.loads(text)
    assert list(content) == ["schema", "model", "calibration"]
    assert content["model"]["source"] == "model"
    assert content["model"]["files"]["tokenizer.json"] == {
        "size": 2,
        "digest": "sha256:" + hashlib.sha256(b"{}").hexdigest(),
    }
    assert content["calibration"]["source"] == "held.txt"


def test_an_equal_lock_is_not_written(here: Path) -> None:
    pinned(here)
    before = (here / "tiny.lock").stat()
    pinned(here)
    after = (here / "tiny.lock").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert sorted(path.name for path in here.iterdir()) == ["held.txt", "model", "some.jsonl", "tiny.lock"]


def test_locked_accepts_what_it_knows(here: Path) -> None:
    assert refusal(RecipeError, here, locked=True) == (
        f"{here / 'tiny.lock'} does not exist, and --locked needs it\nhint: run once without --locked"
    )
    first = pinned(here)
    assert pinned(here, locked=True) == first


def test_locked_names_every_difference(here: Path) -> None:
    wanted = recipe(calibration=Data(path="held.txt"))
    pinned(here, wanted)
    before = (here / "tiny.lock").read_bytes()
    old = sha256_file(here / "model" / "tokenizer.json")
    (here / "model" / "tokenizer.json").write_text("[]")
    new = sha256_file(here / "model" / "tokenizer.json")
    (here / "model" / "vocab.json").write_text("{}")
    (here / "held.txt").write_text("changed")
    text = refusal(RecipeError, here, wanted, locked=True)
    assert text.startswith(f"{here / 'tiny.lock'} does not match, and --locked forbids to change it:\n")
    assert f"  model: tokenizer.json: {old} -> {new}\n" in text
    assert "  model: vocab.json: not there -> sha256:" in text
    assert "  calibration: data.txt: sha256:" in text
    assert text.endswith("hint: bring the files back, or run without --locked and commit the new lock")
    assert (here / "tiny.lock").read_bytes() == before
    text = refusal(RecipeError, here, recipe(parity=Parity(prompts="some.jsonl")), locked=True)
    assert "  calibration: not in the recipe\n" in text
    assert "  prompts: not in the lock\n" in text
    pinned(here, wanted)
    assert pinned(here, wanted, locked=True)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{\n<<<<<<< ours\n", ":2:1: not valid JSON: "),
        ("{\n<<<<<<< ours\n", "hint: it has a merge conflict"),
        ("", ":1:1: not valid JSON"),
        ("[]", ": not a lock of schema 1\nhint: delete it, or run with --update"),
        ('{"schema": 2}', ": not a lock of schema 1"),
        ('{"schema": 1, "model": {}}', " is damaged: "),
        ('{"schema": 1, "model": {"source": "m", "files": {"../x": {"size": 1, "digest": "d"}}}}', "is not a plain"),
        ('{"schema": 1, "model": {"source": "m", "files": {"x": {"size": 1, "digest": "d"}}}}', "size or digest of x"),
        ('{"schema": 1, "model": {"source": "hf://a/b", "revision": "main", "files": {}}}', "hf://a/b has no commit"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_damaged_lock(here: Path, content: str | bytes, text: str) -> None:
    (here / "tiny.lock").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refusal(RecipeError, here)
    assert found.startswith(str(here / "tiny.lock"))
    assert text in found


def test_a_damaged_lock_is_renewed_by_update(here: Path) -> None:
    (here / "tiny.lock").write_text("<<<<<<<")
    pinned(here, update=True)
    assert pinned(here, locked=True)
    assert refusal(RecipeError, here, locked=True, update=True).startswith("--locked and --update exclude each other")


def test_a_folder_that_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(self: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", no)
    assert pinned(here).note == f"{here / 'tiny.lock'} cannot be written: Permission denied"


def test_pins_side_by_side(here: Path) -> None:
    script = (
        "from pathlib import Path; from pipeline.pin import pin; from pipeline.recipe import *\n"
        "for _ in range(20):\n"
        "    pin(Recipe(name='t', model=Model(source='model'), targets={}), Path('tiny.yaml'), cache=Path('cache'))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    children = [subprocess.Popen([sys.executable, "-c", script], cwd=here, env=env) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert pinned(here, locked=True)
    assert not list(here.glob(".tiny*"))


# The hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with `org/tiny`: the same files as the local folder."""
    monkeypatch.setattr(explain, "BACKOFF_S", 0.001)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for hub in serving():
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.commit("org/tiny", FILES, "v1")
        yield hub


HUB = "hf://org/tiny"


def test_a_hub_model(here: Path, hub: Hub) -> None:
    locked = pinned(here, recipe(HUB))
    assert locked.model.uri == HUB
    assert locked.model.revision == hub.repos["org/tiny"].refs["main"]
    assert locked.model.location is None
    assert locked.config == {"model_type": "llama"}
    assert not hub.asked("model.safetensors")  # its digest is announced
    assert not hub.asked("README.md")


def test_hub_and_folder_make_one_key(here: Path, hub: Hub) -> None:
    assert key(pinned(here, recipe(HUB))) == key(pinned(here))
    assert key(pinned(here, recipe(HUB + "@v1"))) == key(pinned(here))


def test_the_lock_answers_for_the_hub(here: Path, hub: Hub) -> None:
    first = pinned(here, recipe(HUB))
    hub.commit("org/tiny", FILES | {"tokenizer.json": b"[]"})  # main moves on
    hub.requests.clear()
    assert pinned(here, recipe(HUB)) == first
    assert pinned(here, recipe(HUB), locked=True) == first
    assert pinned(here, recipe(HUB), offline=True) == dataclasses.replace(first, offline=True)
    assert hub.requests == []
    newer = pinned(here, recipe(HUB), update=True)
    assert newer.model.revision == hub.repos["org/tiny"].refs["main"] != first.model.revision
    assert key(newer) != key(first)
    # What did not change was not downloaded again.
    assert [request.path.rpartition("/")[2] for request in hub.requests if "resolve" in request.path] == [
        "tokenizer.json"
    ]


def test_another_revision_text_asks_again(here: Path, hub: Hub) -> None:
    pinned(here, recipe(HUB))
    hub.commit("org/tiny", FILES | {"tokenizer.json": b"[]"})
    text = refusal(RecipeError, here, recipe(HUB + "@v1"), locked=True)
    assert text.startswith(f"{here / 'tiny.lock'} pins hf://org/tiny, the recipe names hf://org/tiny@v1\n")
    assert pinned(here, recipe(HUB + "@v1")).model.revision == hub.repos["org/tiny"].refs["v1"]
    assert json.loads((here / "tiny.lock").read_text())["model"]["source"] == HUB + "@v1"


def test_trust_remote_code_asks_for_the_code(here: Path, hub: Hub) -> None:
    hub.commit("org/tiny", FILES | {"modeling_own.py": b"1"})
    plain = recipe(HUB)
    trusting = dataclasses.replace(plain, model=dataclasses.replace(plain.model, trust_remote_code=True))
    assert "modeling_own.py" not in [file.path for file in pinned(here, plain).model.files]
    assert "modeling_own.py" in [file.path for file in pinned(here, trusting).model.files]
    assert "modeling_own.py" not in [file.path for file in pinned(here, plain).model.files]


def test_offline_without_a_lock(here: Path, hub: Hub) -> None:
    assert refusal(NetworkError, here, recipe(HUB), offline=True) == (
        "hf://org/tiny is not pinned yet, and --offline forbids to ask the hub\nhint: run once without --offline"
    )
    assert hub.requests == []


def test_a_lock_without_a_cache(here: Path, hub: Hub) -> None:
    first = pinned(here, recipe(HUB))
    clone = here / "clone"
    clone.mkdir()
    (clone / "tiny.lock").write_bytes((here / "tiny.lock").read_bytes())
    assert refusal(NetworkError, clone, recipe(HUB), offline=True).startswith(
        "config.json of hf://org/tiny was never downloaded, and --offline forbids it"
    )
    hub.requests.clear()
    again = pinned(clone, recipe(HUB), locked=True)
    assert (again.model, again.config) == (first.model, first.config)
    assert [request.path.rpartition("/")[2] for request in hub.requests] == ["config.json"]


def test_no_lock_is_left_by_a_failure(here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no revision 'v9'" in refusal(RecipeError, here, recipe(HUB + "@v9"))
    hub.faults["tokenizer.json"] = Fault("drop", 0)
    assert "broke" in refusal(NetworkError, here, recipe(HUB))
    hub.repos["org/tiny"].gated = True
    assert "is gated" in refusal(NetworkError, here, recipe(HUB))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert "cannot be reached" in refusal(NetworkError, here, recipe(HUB))
    assert not (here / "tiny.lock").exists()


def test_a_lock_that_is_needed_and_cannot_be_written(here: Path, hub: Hub) -> None:
    (here / "tiny.yaml").touch()
    locked = here / "tiny.lock"
    pinned(here, recipe(HUB))
    locked.unlink()
    with pytest.MonkeyPatch.context() as patch:
        write_bytes = Path.write_bytes

        def no(self: Path, data: bytes) -> int:
            if "tiny.lock" in self.name:
                raise PermissionError(13, "Permission denied")
            return write_bytes(self, data)

        patch.setattr(Path, "write_bytes", no)
        text = refusal(RecipeError, here, recipe(HUB))
    assert text.startswith(f"{locked} cannot be written: Permission denied\nhint: ")


def test_a_hub_that_lists_bad_names(here: Path, hub: Hub) -> None:
    index = {"weight_map": {"a": "../../escape.safetensors"}}
    files = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    files |= {"model.safetensors.index.json": json.dumps(index).encode(), "../../escape.safetensors": b"x"}
    hub.commit("org/bad", files)
    text = refusal(RecipeError, here, recipe("hf://org/bad"))
    assert "escape.safetensors" in text
    assert not list(here.parent.glob("escape*"))
