"""The recipe language: what is read, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import RecipeError, UnavailableError
from pipeline.parse import load_recipe, recipe_from_plain, resolve
from pipeline.parse.document import MAX_BYTES
from pipeline.plain import to_plain
from pipeline.recipe import Data, Model, Package, Parity, Recipe
from tests.recipes import MINIMAL, RUNTIMES, Options, Quantize, folder, load, options_of

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "errors"


@pytest.fixture(autouse=True)
def recipe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder(tmp_path))
    return tmp_path


def error(text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return caught.value


# --- what users read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.yaml")), ids=lambda file: file.stem)
def test_error_texts_are_the_reviewed_ones(file: Path) -> None:
    # ENGINEWRIGHT_REGENERATE=1 writes the texts anew; read the diff before committing it.
    text = file.read_text(encoding="utf-8")
    overrides = [line[len("# --set ") :] for line in text.splitlines() if line.startswith("# --set ")]
    said = f"{error(text, *overrides)}\n"
    expected = file.with_suffix(".txt")
    if os.environ.get("ENGINEWRIGHT_REGENERATE"):
        expected.write_text(said, encoding="utf-8")
    assert said == expected.read_text(encoding="utf-8")


def test_there_are_no_texts_without_a_recipe() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == {file.stem for file in GOLDEN.glob("*.yaml")}


def test_the_caret_stands_below_the_place_that_is_named() -> None:
    lines = str(error(MINIMAL + "    quantize: {bits: 5}\n")).splitlines()
    _, line, column, _ = lines[0].split(":", 3)
    shown = lines[1].partition(" | ")[2]
    assert (int(line), shown) == (7, "    quantize: {bits: 5}")
    caret = lines[2].partition(" | ")[2].index("^")
    assert caret == int(column) - 1 and shown[caret] == "5"


def test_every_error_of_a_large_recipe_is_counted() -> None:
    targets = "".join(f"  t{number}: {{runtime: copy, bad: 1}}\n" for number in range(150))
    text = str(error(MINIMAL.partition("targets:")[0] + "targets:\n" + targets))
    assert text.startswith("recipe.yaml has 150 errors\n") and text.endswith("\n... and 50 more")


# --- what is read ------------------------------------------------------------------------------------------------


def test_a_minimal_recipe_has_every_default() -> None:
    assert load(MINIMAL) == Recipe(name="tiny", model=Model(source="model"), targets={"cpu": Options(runtime="copy")})


def test_a_full_recipe() -> None:
    recipe = load("""\
name: tiny-llama
version: 1.0
model: {source: ./model, task: text-generation, trust_remote_code: true, license: no}
calibration: {path: data/heldout.txt, samples: 4}
parity:
  data: {path: ./data/heldout.txt, length: 16}
  prompts: null
  seed: 7
targets:
  cpu.int8:
    runtime: onnxruntime
    hardware: h100
    gates: {kld_mean: 1e-9, kld_max: 1, top1: null}
    precision: int8
    quantize: {method: gptq, group_size: +64, symmetric: false, damping: .5}
    skip: [lm_head, '1.0', 0x10]
    shape: [2, 16]
    threads: 4
    template: data/heldout.txt
    session: {a: yes, b: 1.50}
  cpu: {runtime: copy, threads: auto}
package: {description: "1.0", golden: 16}
toolchains:
  optimum: ~/bin/python
""")
    quantize = Quantize(method="gptq", group_size=64, symmetric=False, damping=0.5)
    assert recipe == Recipe(
        name="tiny-llama",
        version="1.0",
        model=Model(source="./model", task="text-generation", trust_remote_code=True, license="no"),
        calibration=Data(path="data/heldout.txt", samples=4),
        parity=Parity(data=Data(path="./data/heldout.txt", length=16), seed=7),
        targets={
            "cpu.int8": Options(
                runtime="onnxruntime",
                hardware="h100",
                gates={"kld_mean": 1e-9, "kld_max": 1.0, "top1": None},
                precision="int8",
                quantize=quantize,
                skip=("lm_head", "1.0", "0x10"),
                shape=(2, 16),
                threads=4,
                template="data/heldout.txt",
                session={"a": "yes", "b": "1.50"},
            ),
            "cpu": Options(runtime="copy"),
        },
        package=Package(description="1.0", golden=16),
        toolchains={"optimum": "~/bin/python"},
    )
    assert isinstance(recipe.targets["cpu.int8"].gates["kld_max"], float)
    assert list(recipe.targets) == ["cpu.int8", "cpu"]


@pytest.mark.parametrize(
    "word", ["no", "1.0", "0x10", "1e5", "2024-01-01", "on", "012", ".inf", "'null'", '"~"', "true"]
)
def test_text_stays_as_written(word: str) -> None:
    assert load(MINIMAL + f"package: {{description: {word}}}\n").package.description == word.strip("'\"")


@pytest.mark.parametrize(
    ("word", "value"), [("1", 1.0), ("1e-9", 1e-9), ("-2.5E+3", -2500.0), ("1.", 1.0), (".5", 0.5)]
)
def test_numbers(word: str, value: float) -> None:
    assert load(MINIMAL + f"    gates: {{top1: {word}}}\n").targets["cpu"].gates == {"top1": value}


@pytest.mark.parametrize("prefix", ["\ufeff", "---\n", "%YAML 1.2\n---\n", "# comment\r\n"])
def test_what_may_stand_before_a_recipe(prefix: str) -> None:
    assert load(prefix + MINIMAL).name == "tiny"


@pytest.mark.parametrize("line_break", ["\r\n", "\r"])
def test_line_breaks_of_other_systems(line_break: str, recipe_folder: Path) -> None:
    text = (MINIMAL + "bad: 1\n").replace("\n", line_break)
    Path("recipe.yaml").write_bytes(text.encode())
    with pytest.raises(RecipeError, match=r"recipe\.yaml:7:1: unknown field 'bad'"):
        load_recipe(Path("recipe.yaml"), options_of, RUNTIMES)


def test_aliases_and_merge_keys() -> None:
    recipe = load("""\
name: tiny
model: {source: model}
targets:
  a: &base
    runtime: copy
    quantize: &quantize {bits: 8, group_size: 64}
    skip: [x]
  b: {runtime: copy, quantize: *quantize}
  c:
    <<: *base
    skip: [y]
    quantize: {<<: [{bits: 4}, *quantize]}
""")
    options = recipe.targets
    assert options["b"].quantize == options["a"].quantize == Quantize(bits=8, group_size=64)  # type: ignore[attr-defined]
    assert options["c"] == Options(runtime="copy", skip=("y",), quantize=Quantize(bits=4, group_size=64))


def test_a_backend_that_is_not_installed_is_named_only_when_the_recipe_is_right() -> None:
    text = MINIMAL + "  vino: {runtime: openvino}\n"
    with pytest.raises(UnavailableError, match="openvino is not installed"):
        load(text)
    assert "unknown field 'packge'" in str(error(text + "packge: {}\n"))


def test_paths_stay_as_written_and_resolve_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(MINIMAL)
    monkeypatch.chdir("/")
    place = tmp_path / "recipe.yaml"
    recipe = load_recipe(place, options_of, RUNTIMES, ["calibration.path=data/heldout.txt"])
    assert recipe.model.source == "model" and recipe.calibration is not None
    assert resolve(place, recipe.calibration.path) == tmp_path / "data" / "heldout.txt"
    assert resolve(place, "/a/b") == Path("/a/b")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve(place, "~/a") == tmp_path / "home" / "a"


@pytest.mark.parametrize(
    "source", ["hf://org/name", "hf://org/name@main", "hf://org/a.b-c@refs/pr/1", "package://minilm/model", "~/model"]
)
def test_sources_that_are_taken(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(MINIMAL, f"model.source={source}").model.source == source


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_recipes(file: Path) -> None:
    from pipeline.cli.prepare import read as read_as_build_does

    assert read_as_build_does(file).targets


# --- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_replace_add_and_create() -> None:
    recipe = load(
        MINIMAL,
        "targets.cpu.quantize.group_size=64",
        "targets.cpu.skip=[a, b]",
        "targets.gpu={runtime: copy, precision: int8}",
        "parity.data.path=data/heldout.txt",
        "targets.cpu.quantize.bits=8",
        "package.description='a=b'",
    )
    assert recipe.targets["cpu"] == Options(runtime="copy", quantize=Quantize(bits=8, group_size=64), skip=("a", "b"))
    assert recipe.targets["gpu"] == Options(runtime="copy", precision="int8")
    assert recipe.parity.data == Data(path="data/heldout.txt")
    assert recipe.package.description == "a=b"


def test_an_override_does_not_reach_what_an_alias_shares() -> None:
    text = MINIMAL + "    quantize: &q {bits: 8}\n  b: {runtime: copy, quantize: *q}\n"
    targets = load(text, "targets.b.quantize.bits=4").targets
    assert [targets[name].quantize.bits for name in ("cpu", "b")] == [8, 4]  # type: ignore[attr-defined]


def test_an_override_finds_a_target_with_dots_in_its_name() -> None:
    text = MINIMAL.replace("cpu:", "cpu.v1.int8:")
    assert load(text, "targets.cpu.v1.int8.precision=int8").targets["cpu.v1.int8"] == Options(
        runtime="copy", precision="int8"
    )


def test_an_override_mends_what_is_wrong_in_the_file() -> None:
    text = MINIMAL + "    quantize: {bits: 5}\n    precision:\n"
    overrides = ["targets.cpu.quantize=null", "targets.cpu.precision=int8"]
    assert load(text, *overrides).targets["cpu"] == Options(runtime="copy", precision="int8")


def test_overrides_alone_can_be_a_recipe() -> None:
    assert load("", "name=a", "model={source: model}", "targets.cpu.runtime=copy").name == "a"


# --- files -------------------------------------------------------------------------------------------------------


def read(path: Path) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, options_of, RUNTIMES)
    return caught.value


def test_a_recipe_that_is_not_there() -> None:
    Path("recipe.yaml").write_text(MINIMAL)
    assert str(read(Path("recpie.yaml"))) == "there is no file recpie.yaml\nhint: did you mean 'recipe.yaml'?"
    assert "init" in read(Path("xyzzy.toml")).hint
    assert "File name too long" in str(read(Path("x" * 5000)))
    assert "null" in str(read(Path("a\0b")))


def test_a_folder_in_place_of_a_recipe() -> None:
    assert str(read(Path("data"))) == "data is a folder, not a recipe\nhint: give the path of a recipe file"
    Path("recipe.yaml").write_text(MINIMAL)
    assert read(Path()).hint == "recipes in it: recipe.yaml"


def test_what_is_not_utf8() -> None:
    Path("recipe.yaml").write_bytes(b"name: a\nmodel: \xe9\n")
    assert str(read(Path("recipe.yaml"))) == "recipe.yaml:2: byte 15 is not UTF-8\nhint: save the file as UTF-8"
    Path("recipe.yaml").write_bytes(MINIMAL.encode("utf-16"))
    assert "recipe.yaml:1: byte 0 is not UTF-8" in str(read(Path("recipe.yaml")))


def test_a_file_that_is_too_large_to_be_a_recipe() -> None:
    Path("recipe.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    assert "larger than" in str(read(Path("recipe.yaml")))
    if Path("/dev/zero").exists():
        assert "larger than" in str(read(Path("/dev/zero")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_recipe_that_may_not_be_read() -> None:
    Path("recipe.yaml").touch(mode=0)
    assert "cannot read 'recipe.yaml': Permission denied" in str(read(Path("recipe.yaml")))


# --- any input ---------------------------------------------------------------------------------------------------

PARTS = (
    ": ",
    ":",
    "\n",
    "\n  ",
    "\n    ",
    "- ",
    ", ",
    "&a ",
    "*a",
    "!x ",
    "? ",
    "|",
    ">",
    "#",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
)
PARTS += ("\\", "%YAML", "---", "...", "@", "`", "\t", "\x85", "\u2028", "\ufeff", "é", "日", "<<", "~", "null", "1e-9")
PARTS += ("name", "model", "source", "targets", "cpu", "runtime", "copy", "quantize", "bits", "4", "gates", "true")
WORDS = st.sampled_from(PARTS)
TEXTS = st.one_of(st.text(), st.lists(WORDS, max_size=40).map("".join))
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def attempt(text: str, *overrides: str) -> None:
    """Reading ends in a recipe or in a RecipeError: nothing else may come out."""
    try:
        load(text, *overrides)
    except RecipeError as problem:
        assert problem.exit_code == 64 and str(problem).encode()
    except UnavailableError:
        assert "openvino" in text + "".join(overrides)


@FUZZ
@given(TEXTS)
def test_any_text(text: str) -> None:
    attempt(text.encode("utf-8", "replace").decode())


@FUZZ
@given(TEXTS, st.integers(0, len(MINIMAL)), st.integers(0, 12))
def test_any_damage_to_a_recipe(text: str, at: int, removed: int) -> None:
    attempt((MINIMAL[:at] + text + MINIMAL[at + removed :]).encode("utf-8", "replace").decode())


@FUZZ
@given(st.text(st.characters()), TEXTS)
def test_any_override(path: str, value: str) -> None:
    attempt(MINIMAL, f"{path}={value}", value, f"targets.cpu.{value}", f"targets.cpu.quantize={value}")


@FUZZ
@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    Path("recipe.yaml").write_bytes(data)
    read(Path("recipe.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "? " * 100_000,
        "a:\n" + "".join(" " * n + "a:\n" for n in range(1, 900)),
    ],
    ids=["flow list", "flow mapping", "block list", "complex keys", "block mapping"],
)
def test_deep_input_ends_soon_and_with_an_error(text: str) -> None:
    started = time.process_time()
    assert "nested too deeply" in str(error(text))
    assert "nested too deeply" in str(error(MINIMAL, f"model={text.replace(chr(10), ' ')}")) or "a:\n" in text
    assert time.process_time() - started < 2


def test_a_long_path_of_an_override() -> None:
    assert "nested too deeply" in str(error(MINIMAL, f"{'a.' * 5000}a=1"))


def test_long_words_are_no_typos_to_search_for() -> None:
    started = time.process_time()
    error(MINIMAL + f"{'x' * 500_000}: 1\npackage: {{golden: {'9' * 100_000}}}\n")
    assert time.process_time() - started < 2


# --- cost --------------------------------------------------------------------------------------------------------


def test_the_time_to_read_grows_with_the_targets_and_not_with_their_square() -> None:
    target = "    runtime: copy\n    gates: {kld_mean: 1e-3}\n    quantize:\n      bits: 4\n      group_size: 64\n"

    def seconds(count: int) -> float:
        text = MINIMAL + "".join(f"  t{number}:\n{target}" for number in range(count))
        started = time.process_time()
        assert len(load(text).targets) == count + 1
        return time.process_time() - started

    assert min(seconds(1000) for _ in range(2)) < 30 * min(seconds(100) for _ in range(3))


def test_reading_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'torch', 'onnx', 'click', 'rich', 'huggingface_hub', 'importlib.metadata', 'jsonschema'}"
    code = f"import sys, pipeline.parse, pipeline.schema; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# --- and back ----------------------------------------------------------------------------------------------------


def test_a_recipe_goes_to_json_and_back() -> None:
    recipe = load(MINIMAL, "targets.cpu.quantize={bits: 8}", "targets.cpu.gates={top1: 1}", "targets.cpu.shape=[3, 4]")
    assert recipe_from_plain(json.loads(json.dumps(to_plain(recipe))), options_of) == recipe
