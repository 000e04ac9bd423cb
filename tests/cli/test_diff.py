"""What `diff` says of two artifacts, and `drift` of an artifact and its recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.artifact.helpers import build, facts, parity
from tests.e2e.harness import COPIES, Site
from tests.registry.door import artifacts, enginewright, ok, refused


def test_equal_artifacts(tmp_path: Path) -> None:
    one, two = build(tmp_path / "a").path, build(tmp_path / "b").path
    assert "the same artifact" in ok("diff", one, two, "--exit-code").out
    found = ok("diff", one, two, "--format", "json").json
    assert found["same"] and found["differences"] == {}


def test_every_kind_of_difference_is_told(tmp_path: Path) -> None:
    from dataclasses import replace

    old = facts()
    stages = (replace(old.stages[0], tools={"onnx": "1.23.0"}), replace(old.stages[1], version=3))
    new = facts(
        recipe={"name": "tiny", "targets": {"cpu": {"quantize": {"scale": 0.25, "big": 1e-09}}}},
        stages=stages,
        precision="int8",
        sources=(replace(old.sources[0], files=(replace(old.sources[0].files[0], digest="sha256:" + "cd" * 32),)),),
    )
    one = build(tmp_path / "a").path
    (tmp_path / "b" / "engine").mkdir(parents=True)
    (tmp_path / "b" / "engine" / "model.onnx").write_bytes(b"other")
    two = build(tmp_path / "b", manifest_facts=new, attestations={"parity": parity(metrics={"kld_mean": 0.5})}).path
    assert enginewright("diff", one, two, "--exit-code").code == 2
    found = ok("diff", one, two, "--format", "json").json["differences"]
    told = {(section, row["what"]): (row["a"], row["b"]) for section, rows in found.items() for row in rows}
    assert told["recipe", "recipe.targets.cpu.quantize.scale"] == (0.002, 0.25)
    assert told["tools", "export: onnx"] == ("1.22.0", "1.23.0")
    assert told["tools", "engine: stage version"] == ("ort.build 2", "ort.build 3")
    assert told["artifact", "precision"] == ("int4", "int8")
    assert told["parity", "parity.metrics.kld_mean"] == (0.001, 0.5)
    assert told["files", "tokenizer.json"][1] == "-"
    assert ("sources", "model: model.safetensors") in told
    text = ok("diff", one, two).out
    assert "export: onnx" in text and "1.23.0" in text


def test_references(tmp_path: Path) -> None:
    made = artifacts(tmp_path / "made")
    ok("push", made, f"oci:{tmp_path}/layout:1")
    ref = f"oci:{tmp_path}/layout:1"
    refused(enginewright("diff", made / "cpu", ref), 64, "several targets", "--target")
    assert "the same artifact" in ok("diff", made / "cpu", ref, "--target", "cpu").out


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A built recipe of two targets that copy."""
    found = Site.write(tmp_path / "site", COPIES)
    monkeypatch.chdir(found.root)
    ok(*found.argv("--quiet"))
    return found


def drift(site: Site, *more: object) -> list[list[str]]:
    """The reasons, target by target."""
    argv = ("drift", "recipe.yaml", "--cache", site.cache, "--out", site.out, "--format", "json", "--detailed-exitcode")
    done = enginewright(*argv, *more)
    reasons = [each["reasons"] for each in done.json["targets"]]
    assert done.code == (2 if any(reasons) else 0), done.err
    return reasons


def test_drift(site: Site) -> None:
    assert drift(site) == [[], []]
    ok("push", site.out / "small", "local:small", "--out", site.out)
    assert drift(site, f"local:small:{version(site)}") == [[], []]
    assert drift(site, "--set", "targets.two.note=new") == [
        [],
        ["recipe: targets.two.note another -> new", "step engine: its inputs or options differ"],
    ]
    config = site.own_model() / "generation_config.json"
    config.write_text(config.read_text() + " ")
    one, two = drift(site)
    assert any("source model: generation_config.json" in reason for reason in one) and one
    assert any(reason.startswith("step model") for reason in two)
    assert drift(site, "--target", "one") == [one]
    assert drift(site, site.out / "nowhere") == [["it was never built"]] * 2


def version(site: Site) -> str:
    """What the build called it."""
    (row,) = ok("ls", "--out", site.out, "--format", "json").json
    return str(row["version"])


def test_drift_names_a_stage_that_changed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from pipeline.targets import copy

    monkeypatch.setattr(copy, "STAGE", replace(copy.STAGE, version=copy.STAGE.version + 1))
    assert drift(site) == [[f"step engine: version {copy.STAGE.version - 1} -> {copy.STAGE.version}"]] * 2
