"""The gguf target through the commands: build, verify, generate, serve, and what is refused before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.e2e.harness import Site, command, refused
from tests.stages.ggufs import family

RECIPE = """\
name: small
version: 1.0.0
model:
  source: model
  license: PSF-2.0
parity:
  data: {path: heldout.txt, samples: 4, length: 64}
  prompts: prompts.jsonl
  prompt_count: 2
  new_tokens: 8
targets:
  f16: {runtime: gguf, precision: F16}
  q8_0: {runtime: gguf, precision: Q8_0}
  q4_k_m: {runtime: gguf, precision: Q4_K_M, layout: ollama, ollama_name: "me/small:q4"}
  iq4_xs: {runtime: gguf, precision: IQ4_XS}
  q2_k: {runtime: gguf, precision: Q2_K, layout: modelfile}
"""
SERVER = """\
import sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.hostnames, parameters.port = sys.argv[1], ["127.0.0.1"], 0
parameters.n_ctx = 512
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site.write(tmp_path_factory.mktemp("gguf") / "site", RECIPE)
    done = command(*site.argv("--format", "json"), cwd=site.root)
    assert done.code == 0, done.err
    targets = {target["target"]: target for target in done.json["targets"]}
    assert {target["outcome"] for target in targets.values()} == {"passed"}
    sizes = [targets[name]["size_bytes"] for name in ("f16", "q8_0", "q4_k_m", "iq4_xs", "q2_k")]
    assert sizes == sorted(sizes, reverse=True)
    assert all(
        target["metrics"]["tokens_differ"] == 0 < target["metrics"]["tokens_compared"] for target in targets.values()
    )
    return site


def artifact(site: Site, target: str) -> Path:
    return site.out / "small" / target


def test_a_second_build_changes_nothing(built: Site) -> None:
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in built.out.rglob("*") if file.is_file()}
    done = command(*built.argv("--format", "json"), cwd=built.root)
    assert done.code == 0, done.err
    assert [target["changed"] for target in done.json["targets"]] == [False] * 5
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before


def test_an_artifact_is_proved_shown_and_generates(built: Site) -> None:
    for target in ("q4_k_m", "q2_k"):
        done = command("enginewright", "verify", "--run", artifact(built, target))
        assert done.code == 0, done.err
        assert "passed" in done.out
    shown = command("enginewright", "inspect", artifact(built, "q4_k_m"))
    assert "Q4_K_M" in shown.out
    assert "bits_per_weight" in shown.out
    words = ("-p", "The with statement", "-n", "8")
    greedy = command("enginewright", "generate", artifact(built, "f16"), *words, "--format", "json")
    assert greedy.code == 0, greedy.err
    assert len(greedy.json["token_ids"]) == 8
    beams = command("enginewright", "generate", artifact(built, "q2_k"), *words, "--beams", "3")
    assert beams.code == 0, beams.err


def test_a_llama_cpp_server_answers_from_the_store(built: Site) -> None:
    """Ollama itself cannot be had here. llama.cpp's server reads the same blob, with the template inside it."""
    folder = artifact(built, "q4_k_m")
    manifest = json.loads((folder / "manifests" / "registry.ollama.ai" / "me" / "small" / "q4").read_bytes())
    model = next(each for each in manifest["layers"] if each["mediaType"].endswith("image.model"))
    blob = folder / "blobs" / model["digest"].replace(":", "-")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(blob)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout
        address = next(line for line in server.stdout if line.startswith("http")).strip()
        body = {"messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)
        server.kill()
    message = found["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"]
    # <|begin|>, <|user|>, the words, <|end|>, <|assistant|>: the tokens that our own chat template gives.
    ours = command("enginewright", "generate", folder, "--chat", "-p", "What is a list?", "-n", "8", "--format", "json")
    assert ours.json["prompt_tokens"] == found["usage"]["prompt_tokens"]
    assert ours.json["text"] == message["content"]


def test_a_failing_structure_publishes_nothing(built: Site, tmp_path: Path) -> None:
    site = Site.write(tmp_path / "site", RECIPE, cache=built.cache)
    site.edit("f16: {runtime: gguf,", "f16: {runtime: gguf, unquantized_gates: {kld_mean: 1.0e-15},")
    done = command(*site.argv("--target", "f16"), cwd=site.root)
    refused(done, 4, "differs from the checkpoint before any quantization", "kld_mean")
    assert not site.out.exists()


REFUSED: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "an unknown type": ("precision: Q4_K_L", 64, ("targets.one.precision", "did you mean")),
    "no calibration": ("precision: Q4_K_M, imatrix: true", 64, ("calibration",)),
    "imatrix of no quantization": ("precision: F16, imatrix: true", 64, ("F16 is no quantization",)),
    "a parameter of Ollama elsewhere": ("precision: Q8_0, system: hi", 64, ("layout: modelfile",)),
    "a wrong parameter": ("layout: ollama, parameters: {heat: 1}", 64, ("no parameter 'heat'",)),
    "a wrong name": ('layout: ollama, ollama_name: "a b"', 64, ("no name for Ollama",)),
    "too long a context": ("context_length: 4096", 64, ("max_position_embeddings is 1024",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_the_plan(case: str, tmp_path: Path) -> None:
    fields, code, words = REFUSED[case]
    recipe = RECIPE.partition("targets:")[0] + f"targets:\n  one: {{runtime: gguf, {fields}}}\n"
    site = Site.write(tmp_path / "site", recipe)
    refused(command(*site.argv("--plan"), cwd=site.root), code, *words)


def test_init_and_doctor_know_the_target(tmp_path: Path) -> None:
    model = ROOT / "recipes" / "models" / "pydoc-llama"
    done = command("enginewright", "init", model, "-o", tmp_path / "recipe.yaml")
    assert done.code == 0, done.err
    text = (tmp_path / "recipe.yaml").read_text("utf-8")
    assert "runtime: gguf" in text
    assert "precision: Q4_K_M" in text
    assert command("enginewright", "build", tmp_path / "recipe.yaml", "--plan", "--cache", tmp_path / "c").code == 0
    states = command("enginewright", "doctor", "--format", "json", env={"ENGINEWRIGHT_CACHE": str(tmp_path / "c")}).json
    assert {"runtime": "gguf", "ok": True, "reason": "installed"} in states["runtimes"]
    assert "xllamacpp" in states["packages"]


LOOSE = "gates: {kld_mean: null, top1: null, perplexity_ratio: null}"
"""Random weights say nothing of what quantization costs. The structure is judged as ever."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "phi3", "llama, llama3 rope"])
def test_one_recipe_builds_every_type_of_a_family(name: str, tmp_path: Path) -> None:
    over: dict[str, Any] = {"max_position_embeddings": 256}
    family(tmp_path / "model", name, **over)
    recipe = RECIPE.replace("  data: {path: heldout.txt, samples: 4, length: 64}\n  prompts: prompts.jsonl\n", "")
    recipe = recipe.replace("runtime: gguf,", f"runtime: gguf, {LOOSE},")
    (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
    argv = ("--cache", tmp_path / "cache", "--out", tmp_path / "out", "--format", "json")
    done = command("build", tmp_path / "recipe.yaml", *argv)
    assert done.code == 0, done.err
    assert len(done.json["targets"]) == 5
    plain = next((tmp_path / "cache").rglob("gguf.parity-*/out/report.json"))
    reports = [json.loads(path.read_bytes()) for path in plain.parents[2].rglob("gguf.parity-*/out/report.json")]
    least = min(report["metrics"]["kld_mean"] for report in reports)
    assert least < 1e-6
