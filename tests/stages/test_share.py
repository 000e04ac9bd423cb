"""Files of one result in another."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.stages.genai_layout import copy_model_files
from pipeline.stages.share import share


def test_what_nobody_can_write_is_linked_and_the_rest_is_copied(tmp_path: Path) -> None:
    for mode, linked in ((0o444, True), (0o644, False)):
        source, place = tmp_path / f"source-{mode}", tmp_path / f"place-{mode}"
        source.write_text("bytes")
        source.chmod(mode)
        share(source, place)
        assert place.read_text() == "bytes" and place.samefile(source) is linked


def test_it_is_copied_where_the_file_system_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "source").write_text("bytes")
    (tmp_path / "source").chmod(0o444)
    monkeypatch.setattr(os, "link", refuse)
    share(tmp_path / "source", tmp_path / "place")
    assert (tmp_path / "place").read_text() == "bytes" and not (tmp_path / "place").samefile(tmp_path / "source")


def test_vocabularies_take_no_room_twice_and_what_a_stage_may_write_stays_apart(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "config.json", "chat_template.jinja"):
        (model / name).write_text(name)
        (model / name).chmod(0o444)
    assert set(copy_model_files(model, out)) == {"tokenizer.json", "vocab.txt", "config.json", "chat_template.jinja"}
    shared = {path.name for path in out.iterdir() if path.samefile(model / path.name)}
    assert shared == {"tokenizer.json", "vocab.txt"}
