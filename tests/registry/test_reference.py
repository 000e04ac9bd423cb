"""References: what a text means, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.registry.reference import Reference, is_reference, parse, version_tag

DIGEST = f"sha256:{'a' * 64}"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ghcr.io/org/model:1.0", Reference("registry", "ghcr.io", "org/model", "1.0")),
        ("localhost/m", Reference("registry", "localhost", "m")),
        ("reg:5000/a/b/c", Reference("registry", "reg:5000", "a/b/c")),
        (f"reg:5000/m:v1@{DIGEST}", Reference("registry", "reg:5000", "m", "v1", DIGEST)),
        (f"[::1]:5000/m@{DIGEST}", Reference("registry", "[::1]:5000", "m", "", DIGEST)),
        ("https://reg/m:1", Reference("registry", "reg", "m", "1", "", "https")),
        ("oci:a/folder:1.0", Reference("layout", "a/folder", "", "1.0")),
        ("oci:/abs/folder", Reference("layout", "/abs/folder")),
        ("oci-archive:x.tar:1.0", Reference("archive", "x.tar", "", "1.0")),
        ("local:bert:1", Reference("local", "", "bert", "1")),
    ],
)
def test_what_is_meant(text: str, meant: Reference) -> None:
    found = parse(text)
    assert found == meant
    assert parse(str(found)) == meant if not meant.scheme else True


@pytest.mark.parametrize(
    "text",
    [
        *("", "model", "org/model", "host.org", "host.org/", "host.org/A", "host.org/a//b", "host.org/a:", "a b.org/x"),
        *("host.org/a:b/c:d e", "host.org/../a", f"host.org/a@sha512:{'a' * 128}", "host.org/a@latest", "-h.org/a"),
        *("oci:", "oci::1", "local:a/b", "local:../x", "local:A", "ftp://h.org/a", "host.org:99999999/a"),
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert caught.value.exit_code == 64


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except RecipeError:
        return
    assert "\n" not in found.repository and ".." not in found.repository.split("/")


def test_folders_are_no_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.models" / "x").mkdir(parents=True)
    for text in ("artifacts/x", "my.models/x", "./x.y/z", "../x.y/z", "/abs/x.y", ".", "x", "~/x.y"):
        assert not is_reference(text), text
    for text in ("ghcr.io/x/y", "localhost/x", "reg:5000/x", "oci:x", "local:x", "https://reg/x"):
        assert is_reference(text), text


def test_tags_of_versions() -> None:
    assert version_tag("1.0.0+cu12") == "1.0.0_cu12"
    with pytest.raises(RecipeError, match="cannot be a tag"):
        version_tag("a version")
