"""Target `tensorrt`: engines for datacenter GPUs, compiled on a GPU of the kind that they are for (10.12 to 11).

The code is that of `tensorrt-rtx`; what this flavour can do beyond it (timing caches, hardware compatibility, version
compatible and stripped plans) are options of `build`. Not verified on hardware: no such machine has run it yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.engine import Engine
from pipeline.frozen import frozen
from pipeline.hardware import Hardware, Verdict, no_cuda
from pipeline.stages.tensorrt.flavours import flavour
from pipeline.step import Step
from pipeline.targets import Facts, Job, trt_facts, trt_steps
from pipeline.targets.trt_steps import TensorRtOptions

EXTRA = "tensorrt"
FLAVOUR = "tensorrt"


@frozen(kw_only=True)
class Options(TensorRtOptions):
    """What a TensorRT target can be asked for."""


def why_not(kind: str, config: Mapping[str, Any], hardware: Hardware) -> str | None:
    """Proposed where it runs; elsewhere people name the GPU."""
    return no_cuda(hardware)


def steps(job: Job, name: str, options: Options, hardware: Hardware) -> tuple[Step, ...]:
    """See `trt_steps.steps`."""
    return trt_steps.steps(job, name, options, hardware, flavour(FLAVOUR))


def facts(engine: Mapping[str, Any], options: Options, hardware: Hardware) -> Facts:
    """See `trt_facts.facts`."""
    return trt_facts.facts(engine)


def open(engine: Path, hardware: Hardware) -> Engine:
    """An Engine on this machine's GPU for an engine's folder or an artifact."""
    from pipeline.targets.trt_runner import open_engine

    return open_engine(engine)


def can_run(manifest: Mapping[str, Any], hardware: Hardware) -> Verdict:
    """See `trt_facts.can_run`."""
    return trt_facts.can_run(manifest, hardware)
