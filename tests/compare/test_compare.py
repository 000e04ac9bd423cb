"""`bench` and `compare` at their doors: what is measured, where each cell comes from, and the report in a browser."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.compare.plot import Axis, scatter
from pipeline.compare.rows import Cell, Row, columns, front
from tests.e2e.harness import DATA, MODEL, command

RECIPE = f"""\
name: compared
model: {{source: {MODEL}, license: PSF-2.0}}
parity:
  data: {{path: {DATA}/pydoc-heldout.txt, samples: 2, length: 64}}
  prompts: {DATA}/prompts.jsonl
  prompt_count: 2
  new_tokens: 8
targets:
  ort-fp32: {{runtime: onnxruntime}}
  ort-int4: {{runtime: onnxruntime, precision: int4}}
  tm-int4: {{runtime: turbomind, precision: int4}}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that was built into `out` beside it, and measured."""
    root = tmp_path_factory.mktemp("compared")
    (root / "recipe.yaml").write_text(RECIPE, "utf-8")
    done = command("build", root / "recipe.yaml", "--cache", root / "cache", "--out", root / "out", "-q")
    assert done.code == 0, done.err
    folders = [root / "out" / "compared" / name for name in ("ort-fp32", "ort-int4")]
    argv = ("--prompt", "16", "--new", "8", "--batch", "1,2", "--rounds", "2", "--format", "json", "--serve")
    done = command("enginewright", "bench", *folders, *argv, "--streams", "2")
    assert done.code == 0, done.err
    (root / "bench.json").write_text(done.out)
    return root


def compare(built: Path, *more: object) -> str:
    done = command("enginewright", "compare", built / "recipe.yaml", "--out", built / "out", *more)
    assert done.code == 0, done.err
    return done.out


def test_bench_tells_speed_memory_and_the_roofline(built: Path) -> None:
    told = json.loads((built / "bench.json").read_text())
    assert [each["target"] for each in told["artifacts"]] == ["ort-fp32", "ort-int4"]
    for each in told["artifacts"]:
        assert [(case["batch"], case["prompt"], case["new"]) for case in each["cases"]] == [(1, 16, 8), (2, 16, 8)]
        for case in each["cases"]:
            metrics = case["metrics"]
            assert {"first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "gap_p50_s", "gap_p99_s"} <= set(
                metrics
            )
            assert all(0 < value["min"] <= value["median"] <= value["max"] for value in metrics.values())
        assert 20e6 < each["peak_rss_bytes"] < 4e9 and each["open_s"] > 0
        assert each["roofline_tokens_per_s"] == pytest.approx(told["bandwidth_bytes_per_s"] / each["weights_bytes"])
        assert each["http"]["requests"] == 4 and each["http"]["tokens_per_s"] > 0
    smaller, larger = sorted(each["weights_bytes"] for each in told["artifacts"])
    assert smaller < larger / 2


def test_every_number_is_in_an_attestation(built: Path) -> None:
    document = json.loads(compare(built, "--format", "json"))
    assert [row["artifact"] for row in document["rows"]] == ["ort-fp32", "ort-int4", "tm-int4"]
    for row in document["rows"]:
        folder = built / "out" / "compared" / row["artifact"]
        cells: dict[str, dict[str, Any]] = row["cells"]
        if row["artifact"] == "tm-int4":
            assert row["verdict"] == "deferred"
            assert cells["decode_tokens_per_s"] == {"value": None, "origin": "deferred", "where": ""}
            weights = json.loads((folder / ".attest" / "parity-checkpoint.json").read_text())["predicate"]["metrics"]
            assert cells["kld_mean"]["value"] == weights["kld_mean"] and cells["kld_mean"]["origin"] == "deferred"
            continue
        parity, bench = (json.loads((folder / ".attest" / f"{name}.json").read_text()) for name in ("parity", "bench"))
        assert bench["subject"][0]["digest"]["sha256"] == row["artifact_id"].removeprefix("sha256:")
        assert cells["kld_mean"]["value"] == parity["predicate"]["metrics"]["kld_mean"]
        speed = bench["predicate"]["cases"][0]["metrics"]["decode_tokens_per_s"]["median"]
        assert cells["decode_tokens_per_s"]["value"] == speed
        assert cells["peak_rss_bytes"]["value"] == bench["predicate"]["peak_rss_bytes"]
        manifest = json.loads((folder / "manifest.json").read_text())
        assert cells["size_bytes"]["value"] == sum(file["size"] for file in manifest["files"])
        assert cells["core"]["origin"] == "cited" and cells["core"]["where"]
    fp32, int4 = (row["cells"]["bits"]["value"] for row in document["rows"][:2])
    assert 31.9 < fp32 < 33 and 4 < int4 < 9


def test_the_forms_say_the_same(built: Path) -> None:
    table = list(csv.DictReader(io.StringIO(compare(built, "--format", "csv"))))
    document = json.loads(compare(built, "--format", "json"))["rows"]
    assert [row["artifact_id"] for row in table] == [row["artifact_id"] for row in document]
    assert float(table[0]["kld_mean"]) == document[0]["cells"]["kld_mean"]["value"]
    assert table[2]["decode_tokens_per_s"] == ""
    markdown = compare(built)
    rows = [line for line in markdown.splitlines() if line.startswith("| ort-int4 |")]
    assert len(rows) == 3
    widths = {line.count("|") for line in markdown.split("\n\n")[0].splitlines()}
    assert len(widths) == 1


class Page(HTMLParser):
    """What the page refers to, and its cells by column."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report_needs_nothing_else(built: Path) -> None:
    text = compare(built, "--format", "html")
    page = Page(text)
    assert page.links == ["data:,"]
    assert "script" not in page.tags and "@import" not in text and "url(" not in text
    assert page.tags.count("svg") == 2 and page.tags.count("table") == 2
    assert "prefers-color-scheme:dark" in text


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_the_report_in_a_browser(width: int, dark: bool, built: Path, tmp_path: Path) -> None:
    """A headless browser renders it, as wide as a desk or a phone: no error, no sideways scrolling of the page."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        assert not os.environ.get("CI"), "CI has no chromium: see ci/debian-packages"
        pytest.skip("no chromium here")
    probe = """<script>addEventListener('load',()=>parent.postMessage({wide:document.documentElement.scrollWidth,
    inner:innerWidth, paper:getComputedStyle(document.body).backgroundColor},'*'))</script></body>"""
    file = tmp_path / "report.html"
    file.write_text(compare(built, "--format", "html").replace("</body>", probe))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    flags += ["--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    frame = tmp_path / "frame.html"  # a window is never narrower than 500 px, a frame is as narrow as a phone
    frame.write_text(
        f'''<body style="margin:0"><iframe src="report.html" width="{width}" height="900" frameborder="0"></iframe>
        <script>addEventListener('message',event=>Object.assign(document.body.dataset,event.data))</script></body>'''
    )
    shot = tmp_path / "shot.png"
    size = f"--window-size={max(width, 500)},900"
    done = subprocess.run(
        [browser, *flags, size, f"--screenshot={shot}", frame.as_uri()], capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    assert shot.stat().st_size > 10_000
    assert "CONSOLE" not in done.stderr, done.stderr
    dumped = subprocess.run(
        [browser, *flags, size, "--dump-dom", frame.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    assert "CONSOLE" not in dumped.stderr, dumped.stderr
    told = dict(re.findall(r'data-(wide|inner|paper)="(?:rgb\()?(\d+)', dumped.stdout))
    assert int(told["inner"]) == width
    assert int(told["wide"]) <= width
    assert (int(told["paper"]) < 80) == dark


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("{out}/compared/ort-fp32",), "nothing to compare with"),
        (("{root}/bench.json", "{out}/compared/ort-fp32"), "neither a recipe nor an artifact's folder"),
        (("{root}/recipe.yaml", "--out", "{root}/elsewhere"), "not built yet"),
    ],
)
def test_what_cannot_be_compared(argv: tuple[str, ...], words: str, built: Path) -> None:
    done = command("enginewright", "compare", *(each.format(out=built / "out", root=built) for each in argv))
    assert done.code == 64
    assert words in done.err


def test_what_does_not_run_here_is_not_measured(built: Path) -> None:
    done = command("enginewright", "bench", built / "out" / "compared" / "tm-int4")
    assert done.code == 5
    assert "needs a CUDA device" in done.err
    file = built / "out" / "compared" / "ort-int4" / "model.onnx"
    copy = built / "copy"
    shutil.copytree(file.parent, copy)
    changed = copy / "model.onnx"
    changed.chmod(0o644)
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    assert command("enginewright", "bench", copy).code == 6
    assert command("enginewright", "compare", copy, file.parent).code == 6


def rows(*points: tuple[str, float | None, float | None]) -> list[Row]:
    def cell(value: float | None) -> Cell:
        return Cell(value, str(value), "measured")

    table = dict.fromkeys((column.name for column in columns("decoder")), Cell(None, "-", "none"))
    return [
        Row(Path(name), name, "decoder", "passed",
            {**table, "target": Cell(name, name, "manifest"), "decode_tokens_per_s": cell(a), "kld_mean": cell(b)})
        for name, a, b in points
    ]  # fmt: skip


def test_the_front_is_what_nobody_beats() -> None:
    some = rows(("a", 10, 1.0), ("b", 20, 2.0), ("c", 15, 3.0), ("d", None, 0.1), ("e", 5, 1.0), ("f", 20, 2.0))
    ahead = front(some, "decode_tokens_per_s", "kld_mean", low_cost=False, low_gain=True)
    assert [row.target for row in ahead] == ["b", "f", "a"]


def test_points_that_lie_together_have_labels_apart() -> None:
    drawing = scatter(
        [("one", 1, 1, True), ("two", 1, 1, True), ("three", 9, 2, False)], Axis("x"), Axis("y", log=True)
    )
    places = re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*>(one|two)<', drawing)
    assert abs(float(places[0][0]) - float(places[1][0])) >= 13


def test_best_of_keeps_the_fastest_that_passes(built: Path, tmp_path: Path) -> None:
    """Two that run here, one whose gate nothing passes, one that cannot run here."""
    recipe = RECIPE.replace(
        "  tm-int4:", "  bad: {runtime: onnxruntime, precision: int8, gates: {kld_mean: 1e-12}}\n  tm-int4:"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    argv = ("--cache", built / "cache", "--out", tmp_path / "out", "--best-of", "--format", "json")
    done = command("build", tmp_path / "recipe.yaml", *argv)
    assert done.code == 0, done.err
    choices = {choice["target"]: choice for choice in done.json["choices"]}
    assert choices["tm-int4"]["kept"] and "does not run here" in choices["tm-int4"]["reason"]
    assert not choices["bad"]["kept"] and "kld_mean" in choices["bad"]["reason"]
    speeds = {name: choices[name]["speed"] for name in ("ort-fp32", "ort-int4")}
    winner = max(speeds, key=lambda name: speeds[name])
    assert [name for name in speeds if choices[name]["kept"]] == [winner]
    loser = min(speeds, key=lambda name: speeds[name])
    assert choices[loser]["reason"] == f"{speeds[loser] / speeds[winner]:.2f} of the speed of {winner}"
    made = {file.parent.name for file in (tmp_path / "out" / "compared").glob("*/manifest.json")}
    assert made == {winner, "tm-int4"}
    none = command(
        "build", tmp_path / "recipe.yaml", "--target", "bad", *argv[:2], "--out", tmp_path / "no", "--best-of"
    )
    assert none.code == 4 and not (tmp_path / "no").exists()
