"""`enginewright generate` as a user meets it: text as it becomes known, JSON, signals, pipes and exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from pipeline.cli.main import run  # noqa: E402
from pipeline.hardware import Hardware, Verdict  # noqa: E402
from pipeline.stages.onnx import fused as onnx_fused  # noqa: E402
from pipeline.stages.onnx import weights as onnx_weights  # noqa: E402
from pipeline.step import silent  # noqa: E402
from tests.artifact import helpers  # noqa: E402

LLAMA = Path(__file__).parents[2] / "recipes" / "models" / "pydoc-llama"
PROMPT = "The string module"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: torch's threads would mostly wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole artifact of the model that ships."""
    root = tmp_path_factory.mktemp("generate")
    (root / "export").mkdir()
    (root / "engine").mkdir()
    onnx_fused.run({"model": LLAMA}, onnx_fused.FusedOptions(), root / "export", silent)
    inputs = {"model": LLAMA, "export": root / "export"}
    onnx_weights.run(inputs, onnx_weights.WeightOptions(precision="fp32", threads=1), root / "engine", silent)
    return helpers.build(root, link="copy").path


@pytest.fixture(scope="module")
def judge() -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(LLAMA)
    model = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()

    def answer(text: str, new: int, special: bool = True, **options: Any) -> tuple[list[int], str]:
        ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=new, do_sample=False, **options)[0, ids["input_ids"].shape[1] :]
        whole = tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True)
        both = tokenizer.decode([*ids["input_ids"][0], *out], skip_special_tokens=True)
        return out.tolist(), both[len(whole) :]

    return answer


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli.main", "generate", *map(str, arguments)]


def test_the_text_is_what_transformers_generates(
    artifact: Path, judge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", str(artifact), "-p", PROMPT, "-n", "40"]) == 0
    assert capsys.readouterr().out == judge(PROMPT, 40)[1] + "\n"


def test_json_is_one_document_with_the_whole_answer(
    artifact: Path, judge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--beams", "3", "--repetition-penalty", "1.2", "-n", "12", "--format", "json", "--stats"]
    assert run(["generate", str(artifact), "-p", PROMPT, *options]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    ids, text = judge(PROMPT, 12, num_beams=3, repetition_penalty=1.2)
    assert (document["token_ids"], document["text"]) == (ids, text)
    assert document["finish_reason"] == ("stop" if ids[-1] == 2 else "length")
    assert document["completion_tokens"] == len(ids) == len(document["logprobs"])
    assert all(value <= 0 for value in document["logprobs"])
    assert "tokens/s" in captured.err


def test_a_chat_goes_through_the_template_and_stops_at_its_end(
    artifact: Path, judge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-p", "What is a list?", "--chat", "--system", "Be brief.", "-n", "60", "--format", "json"]
    assert run(["generate", str(artifact), *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    text = "<|begin|><|system|>Be brief.<|end|><|user|>What is a list?<|end|><|assistant|>"
    assert document["token_ids"] == judge(text, 60, special=False)[0]
    assert document["finish_reason"] == ("stop" if document["token_ids"][-1] == 2 else "length")


def test_a_seed_repeats_a_draw(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        options = ["--temperature", "1.2", "--top-p", "0.95", "--top-k", "50", "--min-p", "0.01", "--seed", str(seed)]
        assert run(["generate", str(artifact), "-p", PROMPT, "-n", "24", "--ignore-eos", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_comes_from_stdin(artifact: Path, judge: Any) -> None:
    done = subprocess.run(command(artifact, "-p", "-", "-n", 8), input=PROMPT.encode(), capture_output=True, check=True)
    assert done.stdout.decode() == judge(PROMPT, 8)[1] + "\n"
    bad = subprocess.run(command(artifact, "-p", "-"), input=b"\xff\xfe", capture_output=True)
    assert bad.returncode == 64
    assert b"stdin is not UTF-8" in bad.stderr


def test_ctrl_c_ends_it_with_what_there_is(artifact: Path) -> None:
    arguments = command(artifact, "-p", PROMPT, "-n", 1000, "--ignore-eos", "--format", "text", "--temperature", "1")
    # A pipe with room for a few words: whoever is faster, the text cannot be finished before the signal is there.
    read, write = os.pipe()
    room = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096) - 64
    os.write(write, b"." * room)
    process = subprocess.Popen(arguments, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    deadline = time.monotonic() + 60
    while struct.unpack("i", fcntl.ioctl(read, termios.FIONREAD, b"0000"))[0] <= room:
        assert time.monotonic() < deadline and process.poll() is None, "it never began to write"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    with os.fdopen(read, "rb") as stream:
        text = stream.read()[room:]
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert text.decode().endswith("\n")
    assert b"Traceback" not in errors


def test_a_reader_that_leaves_is_no_error(artifact: Path) -> None:
    arguments = command(artifact, "-p", PROMPT, "-n", 400, "--ignore-eos")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 0
    assert errors == b""


def test_an_engine_folder_without_a_manifest_runs(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(artifact, tmp_path / "engine")
    (tmp_path / "engine" / "manifest.json").unlink()
    assert run(["generate", str(tmp_path / "engine"), "-p", PROMPT, "-n", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_changed_file_is_not_loaded(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    helpers.rewrite(copy / "generation_config.json", b'{"eos_token_id": 3}')
    assert run(["generate", str(copy), "-p", PROMPT, "-n", "4"]) == 6
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "generation_config.json" in captured.err
    assert run(["generate", str(copy), "-p", PROMPT, "-n", "4", "--no-verify"]) == 0


def test_a_machine_that_cannot_run_it_says_why(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.targets import onnxruntime

    def no(manifest: Any, hardware: Hardware) -> Verdict:
        return Verdict(False, "needs a CUDA device")

    monkeypatch.setattr(onnxruntime, "can_run", no)
    assert run(["generate", str(artifact), "-p", PROMPT]) == 5
    assert "cannot run the artifact: needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{tmp}/absent", "-p", "x"], 64, "is not a folder"),
        (["{tmp}", "-p", "x"], 64, "neither manifest.json nor engine.json"),
        (["{artifact}", "-p", "half \udc80"], 64, "the prompt is not UTF-8"),
        (["{artifact}", "-p", "x", "--system", "y"], 64, "--add"),
        (["{artifact}", "-p", "x", "--beams", "2", "--temperature", "1"], 64, "exclude each other"),
        (["{artifact}", "-p", "word " * 3000], 64, "the engine's context ends at 1024"),
        (["{artifact}", "-p", "x", "--top-p", "0"], 64, "--top-p"),
        (["{artifact}"], 64, "--prompt"),
    ],
)
def test_errors_say_what_to_do(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    given = [argument.format(tmp=tmp_path, artifact=artifact) for argument in arguments]
    assert run(["generate", *given]) == code
    captured = capsys.readouterr()
    assert words.replace("--add", "add --chat") in captured.err
    assert "Traceback" not in captured.err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.cli.main import run; run(['generate', '--help']);"
        "heavy = {'numpy', 'torch', 'onnxruntime', 'tokenizers', 'jinja2'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--repetition-penalty" in done.stdout
