"""`build --best-of`: of the targets for one hardware, the fastest that passes its gates is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.cli.outcome import Judged, why
from pipeline.cli.prepare import Prepared
from pipeline.frozen import frozen
from pipeline.parity.gates import Outcome
from pipeline.store import Entry

if TYPE_CHECKING:
    from pipeline.bench.run import Measured

PROMPT, NEW, ROUNDS = 64, 64, 3


@frozen
class Choice:
    """What became of a target, and why."""

    target: str
    hardware: str
    kept: bool
    reason: str
    speed: float | None = None
    """Tokens or texts a second; None where it was not measured."""


def choose(prepared: Prepared, judged: Sequence[Judged], results: Mapping[str, Entry]) -> list[Choice]:
    """One choice a target. Those that ran here are measured beside each other, straight from the store; an engine that
    cannot run here is kept: nobody knows yet how fast it is. Raises what an engine raises."""
    ran = [each for each in judged if each.outcome is Outcome.PASSED]
    speeds = _speeds({each.target: results[prepared.plan.targets[each.target]["engine"]] for each in ran})
    best: dict[str, str] = {}
    for target, speed in speeds.items():
        name = prepared.hardware[target].name
        if name not in best or speed > speeds[best[name]]:
            best[name] = target
    found = []
    for each in judged:
        hardware = prepared.hardware[each.target].name
        winner = best.get(hardware, "")
        if each.outcome is Outcome.FAILED:
            found.append(Choice(each.target, hardware, False, "; ".join(why(each)[:1])))
        elif each.target not in speeds:
            found.append(Choice(each.target, hardware, True, "not measured: it does not run here"))
        else:
            speed, share = speeds[each.target], speeds[each.target] / speeds[winner]
            reason = "the fastest" if each.target == winner else f"{share:.2f} of the speed of {winner}"
            found.append(Choice(each.target, hardware, each.target == winner, reason, speed))
    return found


def text(choices: Sequence[Choice]) -> str:
    """A line a target."""
    lines = []
    for each in choices:
        speed = f"{each.speed:.1f}/s, " if each.speed is not None else ""
        lines.append(f"{each.hardware}: {each.target} {'kept' if each.kept else 'left out'}: {speed}{each.reason}")
    return "\n".join(lines)


def _speeds(engines: Mapping[str, Entry]) -> dict[str, float]:
    from pipeline.bench.run import Case, measure

    if not engines:
        return {}
    places = {entry.out.resolve(): target for target, entry in engines.items()}
    found = measure(list(places), [Case(1, PROMPT, NEW)], ROUNDS, lambda done, total, note: None)
    return {places[each.artifact]: _speed(each) for each in found}


def _speed(measured: Measured) -> float:
    (case,) = measured.summary()
    metrics = case["metrics"]
    name = "decode_tokens_per_s" if "decode_tokens_per_s" in metrics else "texts_per_s"
    return float(metrics[name]["median"])
