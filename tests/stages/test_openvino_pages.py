"""Pages of mapped files leave the process, and nothing that is read is lost."""

from __future__ import annotations

import mmap
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.stages.openvino import pages

pytestmark = pytest.mark.skipif(not pages.MAPS.exists(), reason="mappings are read from /proc")
SIZE = 64 * 2**20


def resident() -> int:
    """Bytes of files in this process."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights of a model.bin"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())  # the kernel keeps the pages of what is not on the disk
    return path


def test_pages_leave_and_come_again(file: Path) -> None:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        before = resident()
        content = bytes(mapped)
        assert resident() - before > SIZE // 2
        with pages.let_go(file):
            for _ in range(100):
                if resident() - before < SIZE // 8:
                    break
                time.sleep(0.05)
            assert resident() - before < SIZE // 8
            assert bytes(mapped) == content == file.read_bytes()


def test_what_was_written_into_a_private_mapping_stays(file: Path) -> None:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[: SIZE // 2] = b"\x07" * (SIZE // 2)
        assert pages.drop([str(file.resolve())]) > 0
        assert mapped[: SIZE // 2] == b"\x07" * (SIZE // 2)


def test_other_files_are_left_alone(file: Path) -> None:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ):
        assert pages.drop([str(file) + ".other"]) == 0


def test_it_ends_with_its_block(file: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="inside"), pages.let_go(file):
        assert threading.active_count() == before + 1
        raise ValueError("inside")
    assert threading.active_count() == before
