"""Stage openvino.tokenizer: the tokenizer and detokenizer as OpenVINO models, which GenAI and Model Server run."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UnavailableError
from pipeline.frozen import frozen
from pipeline.size import holding
from pipeline.step import Inputs, Progress, Stage

_HINT = "the engine then runs here and in OpenVINO, but not in LLMPipeline: set `tokenizer: false`"


@frozen(kw_only=True)
class TokenizerOptions:
    """Nothing to choose but whether code of the checkpoint may run."""

    trust_remote_code: bool = False


def run(inputs: Inputs, options: TokenizerOptions, out: Path, progress: Progress) -> None:
    """inputs: model. Writes openvino_tokenizer.xml|bin and openvino_detokenizer.xml|bin."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    progress(0, 1, "convert")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            inputs["model"], trust_remote_code=options.trust_remote_code, local_files_only=True
        )
        models = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # transformers and openvino_tokenizers refuse in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnavailableError(f"OpenVINO cannot convert this tokenizer: {reason}", hint=_HINT) from error
    for name, model in zip(("openvino_tokenizer", "openvino_detokenizer"), models, strict=True):
        ov.save_model(model, out / f"{name}.xml", compress_to_fp16=False)
    progress(1, 1, "convert")


STAGE = Stage(
    "openvino.tokenizer",
    run,
    version=1,
    tools=("openvino", "openvino-tokenizers", "transformers", "tokenizers"),
    memory=holding(500),
)
