"""The table as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from pipeline.compare.rows import Column, Row


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table a group of columns, so that each fits a page; below, what the marks mean."""
    target, *rest = columns
    groups = [
        rest[:3] + [c for c in rest if c.best][:7],
        [c for c in rest if c.best][7:],
        [c for c in rest[3:] if not c.best],
    ]
    parts = [_table(rows, [target, *group]) for group in groups if group]
    if any("*" in cell.text for row in rows for cell in row.cells.values()):
        parts.append("\\* of the weights the engine was made from, on another runtime: the engine has not run here.")
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    lines = [
        "| " + " | ".join(column.title for column in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_escape(row.cells[column.name].text) for column in columns) + " |" for row in rows),
    ]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def to_csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A line an artifact, values as they are; its identity first, its verdict last."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["artifact_id", *(column.name for column in columns), "verdict"])
    for row in rows:
        values = [row.cells[column.name].value for column in columns]
        writer.writerow([row.artifact_id, *("" if value is None else value for value in values), row.verdict])
    return out.getvalue()


def to_json(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Every cell with its origin."""
    document = [
        {
            "artifact": row.artifact.name, "artifact_id": row.artifact_id, "verdict": row.verdict,
            "cells": {
                column.name: {"value": cell.value, "origin": cell.origin, "where": cell.where}
                for column in columns
                for cell in [row.cells[column.name]]
            },
        }
        for row in rows
    ]  # fmt: skip
    return json.dumps({"rows": document}, indent=1) + "\n"
