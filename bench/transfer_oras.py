"""What bench/transfer.py asks of oras-py, in its own environment: push or pull one file.

python bench/transfer_oras.py push HOST/REPOSITORY:TAG FILE
python bench/transfer_oras.py pull HOST/REPOSITORY:TAG FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import oras.client  # type: ignore[import-not-found]


def main(verb: str, reference: str, path: Path) -> int:
    """One transfer, the library's defaults."""
    client = oras.client.OrasClient(insecure=True)
    if verb == "push":
        os.chdir(path.parent)
        client.push(target=reference, files=[path.name])
    else:
        client.pull(target=reference, outdir=str(path))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
