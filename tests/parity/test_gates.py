"""Gates: nothing passes that was not measured and good."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.parity import gates
from pipeline.parity.gates import Outcome
from pipeline.tables import table

GOOD = {"kld_mean": 1e-12, "top1": 1.0, "greedy_equal": 1.0, "decode_max_abs": 0.0, "padding_max_abs": 0.0}
GOOD |= {"nonfinite": 0.0}
KINDS = ("decoder", "seq2seq", "encoder")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")


def outcomes(verdicts: tuple[gates.Verdict, ...]) -> dict[str, Outcome]:
    return {verdict.metric: verdict.outcome for verdict in verdicts}


def test_good_passes() -> None:
    verdicts = gates.evaluate(GOOD, "decoder", "fp32")
    assert set(outcomes(verdicts).values()) == {Outcome.PASSED}
    assert all(verdict.passed for verdict in verdicts)
    assert gates.overall(verdicts) is Outcome.PASSED


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_a_number_fails(name: str, value: float | None) -> None:
    verdicts = gates.evaluate({**GOOD, name: value}, "decoder", "fp32")
    assert outcomes(verdicts)[name] is Outcome.FAILED
    assert gates.overall(verdicts) is Outcome.FAILED


@pytest.mark.parametrize("name", GOOD)
def test_what_is_missing_fails(name: str) -> None:
    report = {key: value for key, value in GOOD.items() if key != name}
    assert outcomes(gates.evaluate(report, "decoder", "fp32"))[name] is Outcome.FAILED


def test_thresholds_pass_at_the_limit_and_fail_behind_it() -> None:
    override = {"kld_mean": 0.5, "top1": 0.5}
    for value, worse in ((0.5, False), (0.5000001, True)):
        found = outcomes(gates.evaluate({**GOOD, "kld_mean": value}, "decoder", "fp32", override))
        assert (found["kld_mean"] is Outcome.FAILED) is worse
    for value, worse in ((0.5, False), (0.4999999, True)):
        found = outcomes(gates.evaluate({**GOOD, "top1": value}, "decoder", "fp32", override))
        assert (found["top1"] is Outcome.FAILED) is worse


def test_an_override_adds_a_gate() -> None:
    assert "kld_p99" not in outcomes(gates.evaluate(GOOD, "decoder", "fp32"))
    assert outcomes(gates.evaluate(GOOD, "decoder", "fp32", {"kld_p99": 1.0}))["kld_p99"] is Outcome.FAILED


def test_off_is_said() -> None:
    verdicts = gates.evaluate({**GOOD, "kld_mean": 9.0}, "decoder", "fp32", {"kld_mean": None})
    off = next(verdict for verdict in verdicts if verdict.metric == "kld_mean")
    assert off.outcome is Outcome.OFF
    assert off.value == 9.0
    assert not off.passed
    assert gates.overall(verdicts) is Outcome.PASSED
    assert gates.overall((off,)) is Outcome.OFF


def test_deferred_is_not_passed() -> None:
    verdicts = gates.evaluate(None, "decoder", "int4", {"top1": None})
    assert set(outcomes(verdicts).values()) == {Outcome.DEFERRED, Outcome.OFF}
    assert not any(verdict.passed for verdict in verdicts)
    assert gates.overall(verdicts) is Outcome.DEFERRED


def test_failed_outweighs_deferred() -> None:
    deferred = gates.evaluate(None, "decoder", "fp32")
    assert gates.overall((*deferred, *gates.evaluate({}, "decoder", "fp32"))) is Outcome.FAILED


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        ({"kld_meen": 1.0}, "unknown metric 'kld_meen'", "did you mean 'kld_mean'"),
        ({"zzzzzz": 1.0}, "unknown metric 'zzzzzz'", "metrics: kld_mean"),
        ({"cosine_min": 0.9}, "not measured for a model of kind decoder", "use one of: kld_mean"),
        ({"perplexity_reference": 1.0}, "reported but cannot be a gate", "gate the value"),
        ({"kld_mean": math.nan}, "nan is not a number", "null switches"),
        ({"kld_mean": True}, "True is not a number", "null switches"),
    ],
)
def test_overrides_that_mean_nothing(overrides: dict[str, float], message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        gates.evaluate(GOOD, "decoder", "fp32", overrides)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_unknown_precision_and_kind() -> None:
    with pytest.raises(RecipeError, match="did you mean 'int4'"):
        gates.evaluate(GOOD, "decoder", "int44")
    with pytest.raises(RecipeError, match="kind of model 'robot'"):
        gates.evaluate(GOOD, "robot", "int4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_table_is_whole(kind: str, precision: str) -> None:
    """Every default can be judged, and every kind x precision refuses values that are not finite."""
    for task in (None, *(name for name in table("gates")["tasks"] if kind == "encoder")):
        thresholds = gates.defaults(kind, precision, task)
        gates.check(thresholds, kind)
        assert thresholds["nonfinite"] == 0
    for task in table("gates")["tasks"]:
        assert set(table("gates")["tasks"][task]) == set(PRECISIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_is_never_held_tighter(kind: str) -> None:
    # bf16 and int8 have no order: weights of 8 bits in blocks are finer than bfloat16's 8 bits of mantissa.
    for one, other in (("fp32", "fp16"), ("fp16", "bf16"), ("fp16", "int8"), ("int8", "int4"), ("fp8", "int4")):
        tight, loose = gates.defaults(kind, one), gates.defaults(kind, other)
        for name in set(tight) & set(loose):
            sign = 1 if gates.metrics()[name].direction == "max" else -1
            assert sign * tight[name] <= sign * loose[name], (one, other, name)


def test_every_metric_is_described() -> None:
    for metric in gates.metrics().values():
        assert metric.description.endswith(".")
        assert metric.source
        assert metric.direction in ("max", "min", None)
        assert set(metric.kinds) <= set(KINDS)


def test_explain() -> None:
    verdicts = gates.evaluate({**GOOD, "kld_mean": 0.25, "top1": None}, "decoder", "fp32", {"greedy_equal": None})
    lines = {verdict.metric: gates.explain(verdict) for verdict in verdicts}
    assert lines["kld_mean"] == "kld_mean 0.25 nats (at most 1e-09): failed"
    assert lines["top1"] == "top1 missing or not a number (at least 0.999): failed"
    assert lines["greedy_equal"] == "greedy_equal 1 (no threshold): off"
    deferred = gates.evaluate(None, "decoder", "fp32")[0]
    assert gates.explain(deferred) == "kld_mean not measured yet (at most 1e-09): deferred"


def test_imports_nothing_heavy() -> None:
    program = (
        "import sys; from pipeline.parity import gates; gates.evaluate({}, 'decoder', 'int4'); "
        "print([m for m in ('numpy', 'torch', 'onnxruntime', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"
