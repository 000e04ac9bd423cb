"""The gates of a build as a JUnit XML file, which CI servers show as tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from pipeline.artifact.attest import ParityResult
from pipeline.cli.outcome import Judged
from pipeline.errors import StageError
from pipeline.parity import gates
from pipeline.parity.gates import Outcome


def write_junit(path: Path, name: str, judged: Sequence[Judged]) -> None:
    """One test suite a target, one test case a gate."""
    suites = ElementTree.Element("testsuites", name=name)
    for each in judged:
        count = {outcome: sum(v.outcome is outcome for v in each.verdicts) for outcome in Outcome}
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            name=f"{name}/{each.target}",
            tests=str(len(each.verdicts)),
            failures=str(count[Outcome.FAILED]),
            skipped=str(count[Outcome.DEFERRED] + count[Outcome.OFF]),
        )
        for verdict in each.verdicts:
            case = ElementTree.SubElement(suite, "testcase", classname=f"{name}.{each.target}", name=verdict.metric)
            if verdict.outcome is Outcome.FAILED:
                ElementTree.SubElement(case, "failure", message=gates.explain(verdict))
            elif verdict.outcome is not Outcome.PASSED:
                ElementTree.SubElement(case, "skipped", message=str(verdict.outcome))
        if each.stand_in:
            _stand_in_suite(suites, f"{name}/{each.target}/{each.stand_in.what}", each.stand_in.result)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise StageError(f"--junit: {path} cannot be written: {error.strerror}") from error


def _stand_in_suite(suites: ElementTree.Element, name: str, result: ParityResult) -> None:
    """The gates of what stands for an engine that may not run."""
    tests, failures = str(len(result.passed) + len(result.failed)), str(len(result.failed))
    suite = ElementTree.SubElement(suites, "testsuite", name=name, tests=tests, failures=failures)
    for metric in (*result.passed, *result.failed):
        case = ElementTree.SubElement(suite, "testcase", classname=name.replace("/", "."), name=metric)
        if metric in result.failed:
            ElementTree.SubElement(case, "failure", message=result.reason)
