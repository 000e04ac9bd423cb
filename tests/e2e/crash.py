"""Builds that are killed at their n-th change of the file system. A server, run by test_kill.py.

Each line of standard input is a JSON object {"argv": [...], "fatal": n}; each line of standard output answers one:
{"code": exit code or minus the signal}. Python tells an audit hook of each change before it is made. A build that came
to its end, as one with `fatal` 0 does, also tells "changes", how many it made, and "published", those below its --out.
Modules are imported once, and every build is a fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

CHANGES = {
    "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.truncate",
    "shutil.copyfile", "subprocess.Popen", "fcntl.flock", "ctypes.dlsym",
}  # fmt: skip


def build(argv: list[str], fatal: int, told: Path) -> int:
    """Run the command; the process is killed before its change number `fatal`."""
    from pipeline.cli.main import run

    changes = published = 0
    out = f"{argv[argv.index('--out') + 1]}{os.sep}"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes, published
        writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes or event in CHANGES:
            changes += 1
            if changes == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            published += any(str(each).startswith(out) for each in arguments)

    sys.addaudithook(hook)
    code = run(argv)
    fatal = 0
    told.write_text(json.dumps({"changes": changes, "published": published}))
    return code


def main(told: Path) -> None:
    """Answer every line."""
    import pipeline.cli.build  # noqa: F401  once, not in every child

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)
            os._exit(build(job["argv"], job["fatal"], told))
        _, status = os.waitpid(child, 0)
        answer = {"code": os.waitstatus_to_exitcode(status)}
        if answer["code"] == 0:
            answer |= json.loads(told.read_text())
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
