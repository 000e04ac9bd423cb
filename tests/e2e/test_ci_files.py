"""The CI files that ship, executed step by step against a real registry: what they say is what works.

The runners' own parts are played here: expressions, outputs, secrets, dotenv files, empty caches. `pip install` is a
stand-in that checks that the extras which a file names exist.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.conftest import ROOT
from tests.e2e.harness import BIN, Site, command, environment
from tests.registry import server
from tests.registry.server import Registry

ACTIONS = {"actions/checkout@v4", "actions/setup-python@v5", "actions/cache@v4", "actions/upload-artifact@v4"}
RECIPE = """\
name: small
version: 1.0.0
model:
  source: model
  license: PSF-2.0
parity:
  data:
    path: heldout.txt
    samples: 2
    length: 64
  prompts: prompts.jsonl
  prompt_count: 2
  new_tokens: 8
targets:
  cpu-fp32:
    runtime: onnxruntime
  cpu-int4:
    runtime: onnxruntime
    precision: int4
    quantize:
      group_size: 32
"""
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry of its own."""
    with server.running(tmp_path / "registry") as found:
        yield found


@pytest.fixture
def project(ready: Site, tmp_path: Path) -> Site:
    """A user's repository: recipe, lock, policy and public key; the store has the results of other tests."""
    site = Site.write(tmp_path / "project", RECIPE, cache=ready.cache)
    site.made()  # as the author did: it writes the lock
    shutil.rmtree(site.out)
    assert command("enginewright", "keygen", tmp_path / "release").code == 0
    shutil.copy(tmp_path / "release.pub", site.root)
    (site.root / "policy.yaml").write_text("require: [signature, provenance, parity, sbom]\nkeys: [release.pub]\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "pip").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/pip.log\n')
    (tools / "pip").chmod(0o755)
    for name in ("enginewright", "build", "python"):
        (tools / name).symlink_to(BIN / name)
    return site


def shell(script: str, cwd: Path, env: Mapping[str, str], tools: Path, flags: str) -> None:
    """One step, as a runner starts it."""
    path = {"PATH": f"{tools}:/usr/local/bin:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", *flags.split(), script], cwd=cwd, env={**environment(), **env, **path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


def installed(log: Path) -> list[str]:
    """The extras that the file installs; each must exist."""
    found = [extra for line in log.read_text().splitlines() for extra in re.findall(r"[\w-]+", line.partition("[")[2])]
    assert found and set(found) <= set(EXTRAS)
    return found


def promoted(registry: Registry, repository: str, policy: Path) -> Any:
    """What stands under `latest`; it must be what the policy asks for."""
    ref = f"{registry.address}/{repository}:latest"
    assert command("enginewright", "verify", ref, "--policy", policy).code == 0
    rows = command("enginewright", "ls", ref, "--format", "json").json
    assert [(row["target"], row["parity"], row["signed"]) for row in rows] == [
        ("cpu-fp32", "passed", True),
        ("cpu-int4", "passed", True),
    ]
    return rows


class Actions:
    """As much of GitHub's runner as the file needs."""

    def __init__(self, project: Site, tools: Path, registry: Registry, key: str) -> None:
        self.project, self.tools = project, tools
        self.context: dict[str, Any] = {
            "github": {"repository": "org/repo", "sha": "f" * 40, "actor": "wright", "workspace": str(project.root)},
            "secrets": {"SIGNING_KEY": key, "GITHUB_TOKEN": "token"},
            "needs": {},
        }
        self.summary = tools.parent / "summary"
        self.address = registry.address

    def expand(self, text: str, **more: Any) -> str:
        """`${{ a.b }}` and the host that the file names."""

        def value(match: re.Match[str]) -> str:
            found: Any = {**self.context, **more}
            for name in match[1].strip().split("."):
                found = found[name]
            return str(found)

        return re.sub(r"\$\{\{(.*?)\}\}", value, text).replace("ghcr.io", self.address)

    def job(self, name: str, workflow: Any) -> None:
        """Every step of a job in order."""
        job = workflow["jobs"][name]
        env = {key: self.expand(str(text)) for key, text in {**workflow["env"], **job.get("env", {})}.items()}
        env["ENGINEWRIGHT_CACHE"] = str(self.project.cache)
        steps: dict[str, Any] = {}
        for number, step in enumerate(job["steps"]):
            if "uses" in step:
                assert step["uses"] in ACTIONS
                for text in step.get("with", {}).values():
                    assert "${{" not in self.expand(str(text), steps=steps, env=env)
                continue
            output = self.tools.parent / f"output-{name}-{number}"
            output.touch()
            own = {key: self.expand(str(text), steps=steps, env=env) for key, text in step.get("env", {}).items()}
            told = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(self.summary)}
            script = self.expand(step["run"], steps=steps, env=env)
            shell(script, self.project.root, {**env, **own, **told}, self.tools, "--noprofile --norc -eo pipefail -c")
            if "id" in step:
                lines = (line.partition("=") for line in output.read_text().splitlines())
                steps[step["id"]] = {"outputs": {key: text for key, _, text in lines}}
        outputs = {key: self.expand(text, steps=steps) for key, text in job.get("outputs", {}).items()}
        self.context["needs"][name] = {"outputs": outputs}


def test_github_actions(project: Site, registry: Registry, tmp_path: Path) -> None:
    workflow = yaml.safe_load((ROOT / "ci/github/model.yml").read_text())
    runner = Actions(project, tmp_path / "bin", registry, (tmp_path / "release.key").read_text())
    for name, job in workflow["jobs"].items():
        assert set([job.get("needs")] if job.get("needs") else []) <= set(runner.context["needs"])
        runner.job(name, workflow)
    assert installed(tmp_path / "pip.log") == ["onnxruntime", "sign", "sign"]
    promoted(registry, "org/repo/production/small", project.root / "policy.yaml")
    reference = runner.context["needs"]["build"]["outputs"]["reference"]
    assert reference.startswith(f"{registry.address}/org/repo/small:{'f' * 40}@sha256:")
    suites = ElementTree.parse(project.root / "gates.xml").getroot()
    assert [suite.get("failures") for suite in suites] == ["0", "0"]
    summary = (tmp_path / "summary").read_text()
    assert "| cpu-int4 |" in summary and reference in summary
    assert "PRIVATE KEY" not in summary


def test_gitlab(project: Site, registry: Registry, tmp_path: Path) -> None:
    file = yaml.safe_load((ROOT / "ci/gitlab/model.gitlab-ci.yml").read_text())
    env = {
        "CI_REGISTRY": registry.address,
        "CI_REGISTRY_IMAGE": f"{registry.address}/org/repo",
        "CI_REGISTRY_USER": "wright",
        "CI_REGISTRY_PASSWORD": "token",
        "CI_PROJECT_DIR": str(project.root),
        "CI_COMMIT_SHA": "e" * 40,
        "SIGNING_KEY": str(tmp_path / "release.key"),
    }
    for name, text in file["variables"].items():
        env[name] = re.sub(r"\$(\w+)", lambda match: env[match[1]], str(text))
    env["ENGINEWRIGHT_CACHE"] = str(project.cache)
    done: list[str] = []
    for stage in file["stages"]:
        for name, job in file.items():
            if not isinstance(job, dict) or job.get("stage") != stage:
                continue
            assert set(job.get("needs", [])) <= set(done)
            shell("\n".join(job["script"]), project.root, env, tmp_path / "bin", "-eo pipefail -c")
            reports = job.get("artifacts", {}).get("reports", {})
            if dotenv := reports.get("dotenv"):
                lines = (line.partition("=") for line in (project.root / dotenv).read_text().splitlines())
                env |= {key: text for key, _, text in lines}
            if junit := reports.get("junit"):
                assert len(ElementTree.parse(project.root / junit).getroot()) == 2
            for cached in job.get("cache", {}).get("key", {}).get("files", ()):
                assert (project.root / cached).is_file()
            done.append(name)
    assert done == ["build", "promote"]
    assert installed(tmp_path / "pip.log") == ["onnxruntime", "sign", "sign"]
    promoted(registry, "org/repo/production/small", project.root / "policy.yaml")
