"""Input that no engine can be built from: each a clear error with its exit code, nothing published, nothing lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Site, command, refused, untouched, wait_for

Spoil = Callable[[Site], Any]


def recipe(text: str | bytes) -> Spoil:
    """Another recipe."""
    data = text.encode() if isinstance(text, str) else text
    return lambda site: (site.root / "recipe.yaml").write_bytes(data)


def edit(old: str, new: str) -> Spoil:
    """A text of the recipe replaced."""
    return lambda site: site.edit(old, new)


def write(name: str, data: str | bytes) -> Spoil:
    """A file of the site, or of its own copy of the model."""

    def spoil(site: Site) -> None:
        if name.startswith("model/"):
            site.own_model()
        (site.root / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return spoil


def remove(*names: str) -> Spoil:
    """Files of the model deleted."""

    def spoil(site: Site) -> None:
        for name in names:
            (site.own_model() / name).unlink()

    return spoil


def truncate(name: str, size: int) -> Spoil:
    """A file of the model cut off."""
    return lambda site: os.truncate(site.own_model() / name, size)


def config(**values: Any) -> Spoil:
    """Fields of config.json set, or deleted when None."""

    def spoil(site: Site) -> None:
        path = site.own_model() / "config.json"
        found = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))

    return spoil


def weight(name: str, bits: bytes) -> Spoil:
    """The first bf16 value of a tensor set."""

    def spoil(site: Site) -> None:
        path = site.own_model() / "model.safetensors"
        with path.open("r+b") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            start, _ = json.loads(stream.read(length))[name]["data_offsets"]
            stream.seek(8 + length + start)
            stream.write(bits)

    return spoil


def pickled(site: Site) -> None:
    """The weights are where torch.save would have put them."""
    (site.own_model() / "model.safetensors").rename(site.root / "model" / "pytorch_model.bin")


def bigger_tokenizer(site: Site) -> None:
    """A token more than the embeddings have."""
    path = site.own_model() / "tokenizer.json"
    found = json.loads(path.read_text())
    found["added_tokens"].append({**found["added_tokens"][0], "id": 4096, "content": "<one more>"})
    path.write_text(json.dumps(found))


RECIPES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "empty": (recipe(""), ("recipe.yaml is empty", "init")),
    "a list": (recipe("- a\n- b\n"), ("recipe.yaml:1",)),
    "unclosed": (recipe("name: [a\nmodel: }\n"), ("recipe.yaml:2:6: not YAML", "^")),
    "tabs": (recipe("name: a\nmodel:\n\tsource: b\n"), ("recipe.yaml:3:1: not YAML", "spaces, not tabs")),
    "not text": (recipe(b"name: \xff\xfe\n"), ("recipe.yaml:1", "UTF-8")),
    "twice": (edit("name: small", "name: small\nname: other"), ("recipe.yaml:2:1", "name")),
    "no name": (edit("name: small\n", ""), ("recipe.yaml:1", "name")),
    "no targets": (
        lambda site: recipe((site.root / "recipe.yaml").read_text().partition("targets")[0])(site),
        ("targets",),
    ),
    "typo at the top": (
        edit("version:", "verison:"),
        ("recipe.yaml:2:1: unknown field 'verison'", "did you mean 'version'?"),
    ),
    "typo in model": (edit("license:", "licence:"), ("recipe.yaml:5:3: unknown field 'model.licence'", "'license'")),
    "typo in parity": (
        edit("new_tokens:", "new_token:"),
        ("recipe.yaml:13:3: unknown field 'parity.new_token'", "'new_tokens'"),
    ),
    "typo in data": (edit("samples:", "sample:"), ("recipe.yaml:9:5: unknown field 'parity.data.sample'", "'samples'")),
    "typo in a target": (
        edit("precision: int8", "precison: int8"),
        ("recipe.yaml:19:5: unknown field 'targets.cpu-int8.precison'", "'precision'"),
    ),
    "typo in quantize": (
        edit("group_size:", "groupsize:"),
        ("recipe.yaml:24:7: unknown field 'targets.cpu-int4.quantize.groupsize'", "'group_size'"),
    ),
    "wrong precision": (edit("precision: int8", "precision: int9"), ("recipe.yaml:19:16", "int9", "int8")),
    "a text for a number": (edit("samples: 2", "samples: two"), ("recipe.yaml:9:14", "two")),
    "too small": (edit("samples: 2", "samples: 0"), ("recipe.yaml:9:14", "parity.data.samples")),
    "unknown runtime": (
        edit("runtime: onnxruntime", "runtime: onnxruntim"),
        ("recipe.yaml:16:14: there is no runtime 'onnxruntim'", "did you mean 'onnxruntime'?"),
    ),
    "unknown hardware": (
        edit("runtime: onnxruntime", "runtime: onnxruntime\n    hardware: h1000"),
        ("recipe.yaml:17:15: there is no hardware 'h1000'",),
    ),
    "unknown gate": (
        edit("runtime: onnxruntime", "runtime: onnxruntime\n    gates: {kld_meen: 1}"),
        ("recipe.yaml:17:13", "kld_meen", "did you mean 'kld_mean'?"),
    ),
    "no model": (edit("source: model", "source: modle"), ("recipe.yaml:4:11", "there is no folder 'modle'")),
    "no data": (
        edit("path: heldout.txt", "path: heldout.text"),
        ("recipe.yaml:8:11: 'parity.data.path': there is no file",),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_wrong(bad: Site, name: str) -> None:
    spoil, words = RECIPES[name]
    spoil(bad)
    with untouched(bad):
        done = bad.build()
        refused(done, 64, *words)
        assert "started" not in done.err


MODELS: dict[str, tuple[int, Spoil, tuple[str, ...]]] = {
    "no config": (64, remove("config.json"), ("model", "has no config.json")),
    "config cut": (64, truncate("config.json", 100), ("model/config.json:", "not valid JSON")),
    "config a list": (64, write("model/config.json", "[]"), ("model/config.json:1: expected a JSON object",)),
    "no architecture": (64, config(architectures=None), ("model/config.json", "model.task")),
    "unknown model type": (
        64,
        config(model_type="frob", architectures=["FrobForCausalLM"]),
        ("model_type 'frob'", "newer transformers"),
    ),
    "no model type": (64, config(model_type=None), ("model_type", "config.json")),
    "no weights": (64, remove("model.safetensors"), ("has no weights", "model.safetensors")),
    "pickle only": (64, pickled, ("pytorch_model.bin", "runs code", "refused", "python -c", "use_safetensors=False")),
    "a shard missing": (
        64,
        lambda site: (site.own_model() / "model.safetensors").rename(site.root / "model" / "a.safetensors"),
        ("a.safetensors", "model.safetensors"),
    ),
    "weights cut": (
        3,
        truncate("model.safetensors", 1_000_000),
        ("model.safetensors is truncated", "1000000", "download it again"),
    ),
    "weights cut in the header": (3, truncate("model.safetensors", 100), ("model.safetensors is truncated",)),
    "weights empty": (3, truncate("model.safetensors", 0), ("model.safetensors is truncated: 0 bytes",)),
    "weights garbage": (3, write("model/model.safetensors", bytes(range(256)) * 40), ("model.safetensors",)),
    "git lfs pointer": (
        64,
        write("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"),
        ("model.safetensors", "git lfs pull"),
    ),
    "not a number": (
        3,
        weight("model.layers.1.mlp.down_proj.weight", b"\xc0\x7f"),
        ("'model.layers.1.mlp.down_proj.weight' has NaN", "damaged"),
    ),
    "infinite": (3, weight("model.norm.weight", b"\x80\x7f"), ("'model.norm.weight' has NaN or infinite",)),
    "no tokenizer": (
        64,
        remove("tokenizer.json", "tokenizer_config.json"),
        ("no tokenizer", "tokenizer.json", "copy the tokenizer"),
    ),
    "tokenizer cut": (64, truncate("tokenizer.json", 1000), ("tokenizer.json is not a tokenizer file",)),
    "tokenizer too large": (64, bigger_tokenizer, ("token id 4096", "vocab_size", "4096")),
    "vocabulary too small": (3, config(vocab_size=2000), ("'model.embed_tokens.weight'", "vocab_size is 2000")),
    "vocabulary too large": (64, config(vocab_size=5000), ("model.embed_tokens.weight", "4096", "5000")),
    "a layer missing": (64, config(num_hidden_layers=5), ("model.layers.4.",)),
}


TORCH = (
    "no model type", "weights cut in the header", "weights empty", "weights garbage", "infinite", "tokenizer cut",
    "tokenizer too large", "vocabulary too large", "a layer missing", "data blank", "data short",
    "data longer than the model", "prompts with another field", "prompts a list", "prompts a number", "prompts too few",
    "messages without content",
)  # fmt: skip
"""Found by the step that loads torch, which costs five seconds each: with --slow; one of each kind runs always."""


def cases(names: Iterable[str]) -> list[Any]:
    """Parameters, of which those in TORCH are slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in TORCH else name for name in names]


@pytest.mark.parametrize("name", cases(MODELS))
def test_a_model_that_cannot_be_built(bad: Site, name: str) -> None:
    code, spoil, words = MODELS[name]
    spoil(bad)
    with untouched(bad):
        # One step after the other: side by side, whichever reads the model first says what is wrong with it.
        refused(bad.build("--quiet", "--jobs", "1"), code, *words)
        assert not bad.leftovers()


JSONL = '{"prompt": "a"}\n'
DATA: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "data empty": (write("heldout.txt", ""), ("heldout.txt", "empty")),
    "data blank": (write("heldout.txt", "\n  \n\n"), ("heldout.txt", "empty")),
    "data latin": (write("heldout.txt", b"caf\xc3\xa9\ncaf\xe9\n" * 500), ("heldout.txt:2: not UTF-8", "0xe9")),
    "data cut in a letter": (write("heldout.txt", b"abc\n" * 500 + b"\xc3"), ("heldout.txt:501: not UTF-8",)),
    "data short": (write("heldout.txt", "too little\n"), ("heldout.txt", "2 were asked for", "give more text")),
    "data longer than the model": (edit("length: 64", "length: 5000"), ("5000", "1024 positions", "length")),
    "data of unknown kind": (
        lambda site: (site.edit("heldout.txt", "held.bin"), (site.root / "held.bin").write_text("x")),
        ("held.bin", ".jsonl"),
    ),
    "a folder for data": (
        lambda site: ((site.root / "heldout.txt").unlink(), (site.root / "heldout.txt").mkdir()),
        ("heldout.txt",),
    ),
    "prompts empty": (write("prompts.jsonl", ""), ("prompts.jsonl", "empty")),
    "prompts cut": (write("prompts.jsonl", JSONL + '{"prompt": \n'), ("prompts.jsonl", ":2:", "not JSON")),
    "prompts with another field": (
        write("prompts.jsonl", JSONL + '{"promt": "a"}\n'),
        ("prompts.jsonl", ":2: found 'promt'", "`prompt`"),
    ),
    "prompts a list": (write("prompts.jsonl", '["a"]\n' + JSONL), ("prompts.jsonl", ":1: a JSON object is expected")),
    "prompts a number": (
        write("prompts.jsonl", JSONL + '{"prompt": 7}\n'),
        ("prompts.jsonl", ":2: 'prompt' has to be a text"),
    ),
    "prompts latin": (write("prompts.jsonl", b'{"prompt": "caf\xe9"}\n'), ("prompts.jsonl:1: not UTF-8",)),
    "prompts too few": (
        write("prompts.jsonl", JSONL),
        ("prompts.jsonl", "1 prompts, and 2 were asked for", "prompt_count"),
    ),
    "messages without content": (
        write("prompts.jsonl", '{"messages": [{"role": "user"}]}\n' * 2),
        ("prompts.jsonl", ":1:", "content"),
    ),
    "calibration empty": (
        lambda site: (site.edit("parity:", "calibration: {path: c.txt}\nparity:"), write("c.txt", "")(site)),
        ("c.txt: the calibration file is empty",),
    ),
    "calibration missing": (
        edit("parity:", "calibration: {path: c.txt}\nparity:"),
        ("recipe.yaml:6", "calibration.path", "there is no file"),
    ),
}


@pytest.mark.parametrize("name", cases(DATA))
def test_data_that_cannot_be_used(bad: Site, name: str) -> None:
    spoil, words = DATA[name]
    spoil(bad)
    with untouched(bad):
        refused(bad.build("--quiet"), 64, *words)
        assert not bad.leftovers()


USAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no recipe": (("nothing.yaml",), ("there is no file nothing.yaml",)),
    "a recipe nearly": (("recipe.yml",), ("there is no file recipe.yml", "did you mean 'recipe.yaml'?")),
    "a folder": (("model",), ("model is a folder",)),
    "no argument": ((), ("Missing argument", "RECIPE")),
    "unknown option": (("recipe.yaml", "--fromat", "json"), ("No such option", "--format")),
    "unknown target": (("recipe.yaml", "--target", "cpu-int5"), ("no target 'cpu-int5'", "cpu-int4")),
    "override without a value": (("recipe.yaml", "--set", "name"), ("--set", "field=value")),
    "override of nothing": (
        ("recipe.yaml", "--set", "targets.cpu-int4.quantize.group_siz=64"),
        ("--set", "did you mean 'group_size'?"),
    ),
    "override of a wrong kind": (("recipe.yaml", "--set", "parity.seed=x"), ("--set", "parity.seed")),
    "override not a power of two": (
        ("recipe.yaml", "--set", "targets.cpu-int4.quantize.group_size=63"),
        ("group_size is 63", "32, 64"),
    ),
    "locked and update": (("recipe.yaml", "--locked", "--update"), ("--locked", "--update")),
    "locked without a lock": (("recipe.yaml", "--locked"), ("recipe.lock does not exist", "--locked")),
    "no jobs": (("recipe.yaml", "--jobs", "0"), ("--jobs",)),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_command_that_is_wrong(bad: Site, name: str) -> None:
    argv, words = USAGE[name]
    with untouched(bad):
        done = command("build", *argv, "--cache", bad.cache, "--out", bad.out, cwd=bad.root)
        refused(done, 64, *words)
        assert "started" not in done.err


def test_every_problem_of_a_recipe_at_once(bad: Site) -> None:
    bad.edit("version:", "verison:")
    bad.edit("samples: 2", "samples: none")
    bad.edit("precision: int8", "precison: int8")
    refused(bad.build(), 64, "recipe.yaml:2:1", "recipe.yaml:9:14", "recipe.yaml:19:5", "verison", "precison")


@pytest.mark.parametrize("text", ["", "{", '{"schema": 9}', "<<<<<<< HEAD\n"])
def test_a_damaged_lock(copies: Site, tmp_path: Path, text: str) -> None:
    site = Site.write(tmp_path / "site", (copies.root / "recipe.yaml").read_text(), cache=copies.cache, out=copies.out)
    (site.root / "recipe.lock").write_text(text)
    with untouched(site):
        refused(site.build(), 64, "recipe.lock", "merge conflict" if "<<<" in text else "--update")
    assert site.made("--update") == copies.ids()
    assert site.made("--locked") == copies.ids()


def test_a_model_that_changes_while_it_is_built_is_never_half_used(copies: Site, tmp_path: Path) -> None:
    """The plan has one digest, the fetch finds another."""
    site = Site.write(tmp_path / "site", (copies.root / "recipe.yaml").read_text())
    model = site.own_model()
    other = tmp_path / "other.safetensors"
    shutil.copy(model / "model.safetensors", other)
    with other.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x00")
    # The lock of the step's key holds the build, planned already, until the file has changed.
    steps = site.build("--plan", "--format", "json").json["steps"]
    key = next(step["key"] for step in steps if step["step"] == "model")
    (site.cache / "locks").mkdir(parents=True)
    with (site.cache / "locks" / key).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = site.start()
        wait_for(lambda: _waits(build.pid, site.cache / "locks" / key), "the build waits for the lock")
        other.replace(model / "model.safetensors")
    done = build.end()
    refused(done, 3, "model/model.safetensors changed since the build was planned", "run the build again")
    assert not site.out.exists()
    assert not site.leftovers()
    changed = site.made()
    assert changed != copies.ids()


def _waits(pid: int, lock: Path) -> bool:
    """Whether the process has opened a lock that somebody else holds."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(each.readlink())
    return lock in found
