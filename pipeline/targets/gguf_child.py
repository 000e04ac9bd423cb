"""The child process of a GGUF engine: `python -m pipeline.targets.gguf_child`. It holds llama.cpp; its parent asks.

A message is a header of JSON behind its length (8 bytes, little endian), then as many bytes as its `size` says.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any

from pipeline.errors import EnginewrightError


def send(stream: IO[bytes], header: dict[str, Any], payload: bytes = b"") -> None:
    """Write one message."""
    text = json.dumps({**header, "size": len(payload)}).encode()
    stream.write(len(text).to_bytes(8, "little") + text + payload)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Read one message; None when the other side is gone."""
    length = stream.read(8)
    if len(length) < 8:
        return None
    text = stream.read(int.from_bytes(length, "little"))
    try:
        header: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    payload = stream.read(header["size"])
    return (header, payload) if len(payload) == header["size"] else None


def main() -> int:
    """Answer until the parent closes its end."""
    # What llama.cpp prints must not get between the messages.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    asked = sys.stdin.buffer
    llama: Any = None
    while message := receive(asked):
        header, _ = message
        try:
            if header["do"] == "open":
                from pipeline.targets.gguf_llama import Llama

                llama = Llama(Path(header.pop("file")), **{k: v for k, v in header.items() if k not in ("do", "size")})
                send(out, {"vocab_size": llama.vocab_size})
            elif header["do"] == "tokenize":
                send(out, {"ids": [llama.tokenize(text, special=header["special"]) for text in header["texts"]]})
            else:
                arguments = {name: value for name, value in header.items() if name not in ("do", "size")}
                logits = getattr(llama, header["do"])(**arguments)
                send(out, {"rows": len(logits)}, logits.tobytes())
        except EnginewrightError as error:
            send(out, {"error": [error.exit_code, error.message, error.hint]})
        except Exception as error:
            traceback.print_exc()
            send(out, {"error": [3, f"{type(error).__name__}: {error}", ""]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
