"""NNCF, imported without its telemetry."""

from __future__ import annotations

import logging
import os
from typing import Any


def nncf() -> Any:
    """The module. It reports each use over the network unless it is told that this is its own CI."""
    os.environ["NNCF_CI"] = "1"
    import nncf as module

    module.set_log_level(logging.WARNING)
    return module
