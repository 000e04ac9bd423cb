"""Stage openvino.compile: the compiled engine for one device beside the portable IR, so that a start compiles nothing.

The blob holds the model as the device's plugin transformed it; the weights stay in the .bin that lies beside it, where
OpenVINO can do that: what the blob answers is compared here, and one that is wrong is made again with its weights
inside. It loads in the same version of OpenVINO on the same kind of device alone: engine.json says in which,
`open_engine` checks it and takes the IR elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pipeline import hardware
from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.size import holding
from pipeline.stages.openvino.pages import let_go
from pipeline.stages.openvino.settings import Settings, properties
from pipeline.stages.share import share
from pipeline.step import Inputs, Progress, Stage

BLOB = "openvino_model.blob"


@frozen(kw_only=True)
class CompileOptions:
    """How the engine will run: what decides what is compiled."""

    settings: Settings = field(default_factory=Settings)


def run(inputs: Inputs, options: CompileOptions, out: Path, progress: Progress) -> None:
    """inputs: ir (an engine's folder). Writes the same folder with a blob, and says in engine.json where it loads."""
    import openvino as ov

    from pipeline.stages.checkpoint import read_json
    from pipeline.stages.openvino.file import XML
    from pipeline.stages.openvino.graphs import last_logits_only
    from pipeline.stages.openvino.layout import write_json

    engine = read_json(inputs["ir"] / "engine.json")
    decoder = engine["kind"] == "decoder"
    for file in sorted(inputs["ir"].iterdir()):
        if file.name != "engine.json":
            share(file, out / file.name)
    asked = properties(options.settings, decoder=decoder)
    progress(0, 1, options.settings.device)
    core = ov.Core()

    def read() -> tuple[Any, bool]:
        model = core.read_model(out / XML)
        return model, decoder and last_logits_only(model)

    try:
        weights, last = _write_blob(
            core, read, options.settings.device, asked, out / BLOB, (out / XML).with_suffix(".bin")
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1:] or ["no reason given"]
        raise StageError(f"OpenVINO cannot compile it for {options.settings.device}: {reason[0].strip()}") from error
    engine["compiled"] = {
        "file": BLOB,
        "weights": weights,
        "answers": "last" if last else "all",
        "openvino": ov.__version__,
        "device": options.settings.device,
        "properties": asked,
        **here(),
    }
    write_json(out / "engine.json", engine)
    progress(1, 1, options.settings.device)


def import_properties(asked: Mapping[str, str], weights: str, file: Path) -> dict[str, str]:
    """What import_model is told: the engine's properties, and the .bin of a blob whose `weights` are there."""
    return {**asked, "CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(file)} if weights == "bin" else dict(asked)


def import_blob(core: Any, file: Path, device: str, told: Mapping[str, str]) -> tuple[Any, Any]:
    """The compiled model of a blob, and the mapped memory that has to outlive it. RuntimeError if it does not load."""
    import numpy as np
    import openvino as ov

    mapped = ov.Tensor(np.memmap(file, np.uint8, "c"), shared_memory=True)
    return core.import_model(mapped, device, dict(told)), mapped


def _write_blob(
    core: Any,
    read: Callable[[], tuple[Any, bool]],
    device: str,
    asked: Mapping[str, str],
    file: Path,
    weights_file: Path,
) -> tuple[str, bool]:
    """Write the blob; whether its weights are in the `bin` or `inside`, and whether it gives the last logits alone,
    which `read` says beside each new model. RuntimeError where neither answers as the model that was compiled:
    OpenVINO 2026.4 loses constants of some graphs when it leaves weights out.

    Only one of the model, the blob and what is imported from it is held at a time. The blob is written before the
    first inference, which copies every weight into the plugin's own layout.
    """
    for weights, mode in (("bin", {"CACHE_MODE": "OPTIMIZE_SIZE"}), ("inside", {})):
        model, last = read()
        feeds = _feeds(model)
        compiled = core.compile_model(model, device, {**asked, **mode})
        exported = compiled.export_model()
        file.write_bytes(exported if isinstance(exported, bytes) else exported.getbuffer())
        del exported
        with let_go(weights_file):
            expected = _answers(compiled, feeds)
        del compiled, model
        try:
            imported, mapped = import_blob(core, file, device, import_properties(asked, weights, weights_file))
            with let_go(weights_file, file):
                found = _answers(imported, feeds)
            del imported, mapped
        except RuntimeError:
            continue
        if all(_near(got, wanted) for got, wanted in zip(found, expected, strict=True)):
            return weights, last
    raise RuntimeError("what was compiled does not answer alike after it was exported and imported")


def _feeds(model: Any) -> list[dict[str, Any]]:
    """Inputs of two calls: two rows of seven tokens, then one more token each (decoders); or of images by seed."""
    import numpy as np

    drawn = np.random.default_rng(0)
    names = {port.get_any_name(): port for port in model.inputs}
    calls = []
    for new, total in ((7, 7), (1, 8)) if "beam_idx" in names else ((7, 7),):
        feed = {}
        for name, port in names.items():
            kind = port.get_element_type().to_dtype()
            dims = [
                dim.get_length() if dim.is_static else 2 if axis == 0 else 0
                for axis, dim in enumerate(port.get_partial_shape())
            ]
            length = total if name == "attention_mask" else new
            shape = [dim or length for dim in dims]
            if name == "beam_idx":
                feed[name] = np.array([1, 0], kind)
            elif name == "attention_mask":
                feed[name] = np.ones(shape, kind)
            elif name == "position_ids":
                feed[name] = np.tile(np.arange(total - new, total, dtype=kind), (2, 1))
            elif np.issubdtype(kind, np.floating):
                feed[name] = drawn.normal(size=shape).astype(kind)
            else:
                feed[name] = drawn.integers(0, 2 if name == "token_type_ids" else 5, shape).astype(kind)
        calls.append(feed)
    return calls


def _answers(compiled: Any, feeds: list[dict[str, Any]]) -> list[Any]:
    """Every output of every call."""
    import numpy as np

    request = compiled.create_infer_request()
    return [np.array(value) for feed in feeds for value in request.infer(feed).values()]


def _near(found: Any, expected: Any) -> bool:
    import numpy as np

    same = found.shape == expected.shape and np.isfinite(found).all()
    return bool(same and np.abs(found - expected).max(initial=0) <= 1e-3 * np.abs(expected).max(initial=0))


def here() -> dict[str, Any]:
    """This CPU, as far as compiled code depends on it."""
    host = hardware.probe()
    return {"os": host.os, "arch": host.arch, "isa": list(host.isa)}


STAGE = Stage("openvino.compile", run, version=1, tools=("openvino",), scope="isa", memory=holding(320, weights=0.5))
