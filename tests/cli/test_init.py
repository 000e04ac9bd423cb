"""`enginewright init`: what it writes for which model on which host, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import hardware, targets
from pipeline.cli import doctor
from pipeline.cli.main import run
from pipeline.cli.prepare import read
from pipeline.hardware import Hardware
from pipeline.recipe import Recipe
from tests.hub import Hub
from tests.recipes import Options

HOST = Hardware(name="host", os="linux", arch="x86_64", isa=("avx2", "avx512_vnni"), cores=4, memory_bytes=1 << 30)


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of our own with one backend, so that the test does not depend on what is installed here."""
    monkeypatch.chdir(tmp_path)
    common = {"Options": Options, "EXTRA": ""}
    toy = type("Backend", (), {**common, "why_not": staticmethod(lambda *_: None)})
    never = type("Never", (), {**common, "why_not": staticmethod(lambda *_: "")})
    monkeypatch.setattr(hardware, "probe", lambda: HOST)
    monkeypatch.setattr(targets, "names", lambda: ["copy", "toy"])
    monkeypatch.setattr(targets, "load", lambda name: never if name == "copy" else toy)
    monkeypatch.setattr(doctor, "runtime_state", lambda name: {"runtime": name, "ok": True, "reason": "installed"})


def model(path: str = "model", architecture: str = "LlamaForCausalLM", **config: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **config}))
    return folder


def written(*arguments: str, output: str = "recipe.yaml") -> Recipe:
    assert run(["init", *arguments]) == 0
    return read(Path(output))


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    before = sorted(Path().rglob("*"))
    assert run(["init", *arguments]) == code
    assert sorted(Path().rglob("*")) == before, "a refusal leaves nothing behind"
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertModel", "feature-extraction"),
        ("ViTForImageClassification", "image-classification"),
    ],
)
def test_the_task_comes_from_the_model(architecture: str, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    model("models/My Model_v1.5", architecture)
    recipe = written("models/My Model_v1.5")
    assert (recipe.name, recipe.model.source, recipe.model.task) == ("my-model-v1.5", "models/My Model_v1.5", task)
    assert capsys.readouterr().out.splitlines()[-1] == "next: enginewright build recipe.yaml"


def test_targets_fit_the_kind_and_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model()
    recipe = written("model")
    assert recipe.targets == {"cpu-int8": Options(runtime="toy", precision="int8")}  # this backend has no int4
    assert "with avx512_vnni" in Path("recipe.yaml").read_text()
    monkeypatch.setattr(hardware, "probe", lambda: Hardware(name="host", os="linux", arch="x86_64", isa=("sse4_2",)))
    assert list(written("model", "--force").targets) == ["cpu-fp32"]


def test_a_second_backend_has_names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model()
    monkeypatch.setattr(targets, "names", lambda: ["copy", "toy", "toy2"])
    assert {name: target.runtime for name, target in written("model").targets.items()} == {
        "cpu-int8": "toy",
        "toy2-int8": "toy2",
    }


def test_a_backend_that_cannot_build_here_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model()
    state = {"ok": False, "reason": "missing onnx: pip install 'enginewright[toy]'"}
    monkeypatch.setattr(doctor, "runtime_state", lambda name: state if name == "toy" else {"ok": True})
    said = refused(capsys, 5, "model")
    assert said == ("error: no backend here builds it\nhint: toy: missing onnx: pip install 'enginewright[toy]'\n")


def test_data_are_named_from_where_the_recipe_lies() -> None:
    model()
    for name in ("held out.txt", "cal.jsonl", "prompts.jsonl"):
        Path(name).write_text("x\n")
    Path("deep/er").mkdir(parents=True)
    prompts = str(Path("prompts.jsonl").resolve())
    arguments = ("--data", "held out.txt", "--calibration", "cal.jsonl", "--prompts", prompts)
    recipe = written("model", "-o", "deep/er/my.yaml", *arguments, output="deep/er/my.yaml")
    assert recipe.model.source == "../../model"
    assert recipe.calibration is not None and recipe.calibration.path == "../../cal.jsonl"
    assert recipe.parity.data is not None and recipe.parity.data.path == "../../held out.txt"
    assert recipe.parity.prompts == prompts


def test_every_field_is_there_with_its_doc_and_can_be_uncommented() -> None:
    model()
    sparse = written("model", "--name", "tiny")
    lines = Path("recipe.yaml").read_text().splitlines()
    assert any(line.startswith("  # A local folder (relative to the recipe), `hf://org/name[@rev") for line in lines)
    assert "# Data for quantization that calibrates. Never used to judge the result." in lines
    Path("data").mkdir()
    for name in ("heldout.txt", "calibration.txt", "prompts.jsonl"):
        Path("data", name).write_text("x\n")
    # Prose ends like a sentence or is longer than a field; the rest are fields.
    active = [line.replace("# ", "", 1) if _is_field(line.strip()) else line for line in lines]
    Path("all.yaml").write_text("\n".join(active))
    full = read(Path("all.yaml"))
    assert full.calibration is not None and full.calibration.path == "data/calibration.txt"
    assert full.parity.data is not None and full.parity.prompts == "data/prompts.jsonl"
    assert full.targets["cpu-int8"].quantize is not None  # type: ignore[attr-defined]
    assert full.parity.seed == sparse.parity.seed and full.package == sparse.package


def _is_field(line: str) -> bool:
    name, colon, value = line.removeprefix("#").strip().partition(":")
    return line.startswith("#") and bool(colon) and name.isidentifier() and not value.endswith(".")


@pytest.mark.parametrize("name", ["a b", "it's", 'say "hi"', "# a", "colon: here", "yes", "12", "ü", "a\tb"])
def test_any_folder_name_is_written_so_that_it_reads_back(name: str) -> None:
    model(name)
    recipe = written(name, "--name", "x")
    assert recipe.model.source == name


def test_a_file_that_is_there_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    model()
    Path("recipe.yaml").write_text("mine")
    assert "recipe.yaml is there already" in refused(capsys, 64, "model")
    assert Path("recipe.yaml").read_text() == "mine"
    assert written("model", "--force").name


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "for the Hugging Face hub write hf://org/name" in refused(capsys, 64, "org/name")
    assert "there is no folder ./x" in refused(capsys, 64, "./x")
    assert "not installed" in refused(capsys, 5, "package://no_such_package_here/model")


def test_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert "empty: no config.json" in refused(capsys, 64, "empty")
    model("odd", "Nonsense")
    assert "cannot tell the task" in refused(capsys, 64, "odd")
    Path("odd/config.json").write_text("{")
    assert "not JSON" in refused(capsys, 64, "odd")


def test_arguments_that_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    model()
    Path("data.csv").write_text("a,b\n")
    assert "'--data': File 'nowhere.txt' does not exist" in refused(capsys, 64, "model", "--data", "nowhere.txt")
    assert "suffix '.csv'" in refused(capsys, 64, "model", "--prompts", "data.csv")
    assert "there is no folder no" in refused(capsys, 64, "model", "-o", "no/recipe.yaml")
    said = refused(capsys, 64, "model", "--name", "Not A Name")
    assert said.startswith("error: recipe.yaml:5:7: 'name' cannot be 'Not A Name'")


def test_a_package_that_carries_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model("carrier/model", "BertModel")
    Path("carrier/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    recipe = written("package://carrier/model")
    assert (recipe.name, recipe.model.source) == ("carrier", "package://carrier/model")


def test_a_model_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        config = b'{"architectures": ["BertModel"]}'
        hub.commit("org/Tiny-BERT", {"config.json": config, "modules.json": b"[]", "model.safetensors": b"x" * 99})
        recipe = written("hf://org/Tiny-BERT@main")
    assert (recipe.name, recipe.model.source) == ("tiny-bert", "hf://org/Tiny-BERT@main")
    assert recipe.model.task == "feature-extraction"
    assert not any("safetensors" in request.path for request in hub.requests), "weights are not asked for"
