"""Small judgements on what comes from a registry: is a host this machine, and can a text steer a terminal?"""

from __future__ import annotations

import ipaddress
import unicodedata


def is_loopback(netloc: str) -> bool:
    """Whether `host` or `host:port` is this machine."""
    host = netloc.rpartition("@")[2]
    host = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def plain(text: str) -> str:
    """Text from outside, with what could steer a terminal replaced."""
    return "".join("?" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in text)
