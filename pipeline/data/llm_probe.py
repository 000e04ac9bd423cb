"""Is this the engine that was asked for, and does it answer? Standard library only; travels with the artifact.

    python probe.py engine              LMDeploy: would it serve this folder with TurboMind? Run it before the server.
    python probe.py wait URL [SECONDS]  a server is ready when it has generated one real token (default 600 s)

A server that asks for a key is told that of $VLLM_API_KEY or $LLAMA_API_KEY.

Exit code 0: yes. A server whose port answers may still die on the first token, or have fallen back to a slower engine.
"""

import json
import os
import pathlib
import sys
import time
import urllib.error
import urllib.request


def engine() -> int:
    """LMDeploy takes its PyTorch engine, with no more than a warning, for what TurboMind does not know or load."""
    try:
        from lmdeploy.archs import autoget_backend
    except ImportError as error:
        print(f"lmdeploy does not import: {error}", file=sys.stderr)
        return 1
    found = autoget_backend(str(pathlib.Path(__file__).resolve().parent))
    if found != "turbomind":
        print(f"LMDeploy would serve this folder with its {found!r} engine, not with TurboMind", file=sys.stderr)
        return 1
    print("turbomind")
    return 0


def wait(url: str, seconds: float) -> int:
    """Ask for one token until one comes."""
    deadline, last = time.monotonic() + seconds, "no answer"
    while time.monotonic() < deadline:
        try:
            model = _ask(f"{url}/v1/models")["data"][0]["id"]
            body = {"model": model, "prompt": "The", "max_tokens": 1, "temperature": 0}
            choice = _ask(f"{url}/v1/completions", body)["choices"][0]
            if isinstance(choice["text"], str) and choice["finish_reason"] in ("length", "stop"):
                print(f"{model}: {choice['text']!r}")
                return 0
            last = json.dumps(choice)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            last = str(error)
        time.sleep(1)
    print(f"not ready after {seconds:.0f} s: {last}", file=sys.stderr)
    return 1


def _ask(url: str, body: dict[str, object] | None = None) -> dict:  # type: ignore[type-arg]
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY") or os.environ.get("LLAMA_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.loads(answer.read()))


def main(argv: list[str]) -> int:
    if argv == ["engine"]:
        return engine()
    if len(argv) in (2, 3) and argv[0] == "wait":
        return wait(argv[1].rstrip("/"), float(argv[2]) if len(argv) == 3 else 600)
    print(__doc__, file=sys.stderr)
    return 64


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
