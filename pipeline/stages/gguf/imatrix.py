"""Stage `gguf.importance`: how much each input channel of each matrix counts, measured on calibration data.

The mean square of a channel's values over all tokens, as llama.cpp's own importance matrix has it, from hooks in torch.
The output matrix is left out, as llama.cpp leaves it out by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.frozen import frozen
from pipeline.recipe import option
from pipeline.size import holding
from pipeline.step import Inputs, Progress, Stage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FILE = "importance.npz"


@frozen(kw_only=True)
class ImportanceOptions:
    """How much data is used."""

    samples: int = option(32, "Samples of the calibration data.", ge=1)
    length: int = option(256, "Length of a sample.", unit="tokens", ge=2)


def run(inputs: Inputs, options: ImportanceOptions, out: Path, progress: Progress) -> None:
    """inputs: model, calibration. Writes importance.npz: GGUF name -> [columns] float32."""
    import gguf
    import numpy as np
    import torch
    import transformers

    from pipeline.stages import samples as text
    from pipeline.stages.checkpoint import read_json
    from pipeline.stages.gguf.families import read_model

    model = read_model(read_json(inputs["model"] / "config.json"), context_length=1)
    if model.experts:
        raise StageError(
            "the importance matrix of a mixture of experts is not measured yet", hint="leave `imatrix` out"
        )
    encoder = text.load_encoder(inputs["model"], model.vocab)
    ids = text.windows(text.data_file(inputs["calibration"]), encoder, options.samples, options.length)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.arch)
    names = gguf.get_tensor_name_map(arch, model.layers)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(
        inputs["model"], dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, given: tuple[Any, ...]) -> None:
            values = given[0].detach().reshape(-1, given[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + values.square().sum(0)

        return hook

    for name, module in torch_model.named_modules():
        target = names.get_name(name) if isinstance(module, torch.nn.Linear) else None
        if target and target.startswith("blk."):
            module.register_forward_pre_hook(watch(f"{target}.weight"))
    with torch.no_grad():
        for index, sample in enumerate(ids):
            progress(index, len(ids), "calibration")
            torch_model(torch.from_numpy(sample)[None], use_cache=False)
    count = ids.size
    found = {name: (total / count).float().numpy() for name, total in sums.items()}
    broken = next((name for name, values in found.items() if not np.isfinite(values).all()), None)
    if broken or not found:
        raise StageError(f"the activations into {broken} are not finite" if broken else "no matrix was reached")
    np.savez(out / FILE, **{name: found[name] for name in sorted(found)})


def read_importance(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """GGUF name -> [columns] float32."""
    import numpy as np

    with np.load(folder / FILE) as stored:
        return {name: np.ascontiguousarray(stored[name], np.float32) for name in stored.files}


STAGE = Stage(
    "gguf.importance",
    run,
    version=1,
    tools=("torch", "transformers", "tokenizers", "gguf", "numpy"),
    scope="isa",
    memory=holding(450, weights=1.7, logits=3),
)
