"""The scripts of bench/ import each other by name, as they do when they are run."""

from __future__ import annotations

import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
