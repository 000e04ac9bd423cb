"""Plots: the right numbers in a file that is the same twice."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline.errors import RecipeError, UnavailableError

plots = pytest.importorskip("pipeline.parity.plots")
pytest.importorskip("matplotlib")

KLD = {"cpu-int8": np.array([0.0, 1e-5, 3e-5], np.float32), "cpu-int4": np.array([1e-3, 2e-2, np.nan], np.float32)}
REPORTS = {"cpu-int8": {"kld_mean": 1.25e-5, "top1": 0.993}, "cpu-int4": {"kld_mean": 0.00375, "top1": None}}


def texts(path: Path) -> str:
    return path.read_text() if ElementTree.parse(path).getroot().tag.endswith("svg") else ""


def test_divergence(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plots.plot_divergence(KLD, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "cpu-int8" in texts(tmp_path / "a.svg")
    plots.plot_divergence(KLD, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RecipeError, match="no divergences"):
        plots.plot_divergence({"encoder": np.empty(0)}, tmp_path / "c.svg")


def test_metrics(tmp_path: Path) -> None:
    plots.plot_metrics(REPORTS, ["kld_mean", "top1"], tmp_path / "a.svg")
    found = texts(tmp_path / "a.svg")
    for text in ("kld_mean, nats", "1.25e-05", "0.00375", "0.993"):
        assert text in found
    with pytest.raises(RecipeError, match="no metric is called 'kld_meen'"):
        plots.plot_metrics(REPORTS, ["kld_meen"], tmp_path / "a.svg")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match="matplotlib is not installed") as caught:
        plots.plot_divergence(KLD, tmp_path / "a.svg")
    assert "report" in caught.value.hint
