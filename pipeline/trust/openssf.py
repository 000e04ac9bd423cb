"""A signature in OpenSSF's model-signing format (a Sigstore bundle), by the package of that name.

It covers every file of the folder but `.attest/`, where it lies as `model.sig`. Anybody with `model_signing` checks it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pipeline.artifact import paths
from pipeline.errors import RecipeError, UnavailableError, VerificationError
from pipeline.trust.keys import PrivateKey

NAME = "model.sig"


def sign(folder: Path, key: PrivateKey) -> Path:
    """Write `.attest/model.sig`. RecipeError for a kind of key that the format does not take."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if not isinstance(key.key, ec.EllipticCurvePrivateKey):
        raise RecipeError(
            "OpenSSF model signing takes keys on P-256 and P-384, not Ed25519", hint="`enginewright keygen --kind p256`"
        )
    signing, _, hashing = _modules()
    place = folder / paths.ATTESTATIONS / NAME
    place.parent.mkdir(exist_ok=True)
    pem = key.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # The package takes a file. It lives for a moment, in a folder that nobody else may open.
    with tempfile.TemporaryDirectory(prefix="enginewright-") as scratch:
        held = Path(scratch) / "key"
        held.touch(mode=0o600)
        held.write_bytes(pem)
        config = signing.Config().use_elliptic_key_signer(private_key=held)
        config.set_hashing_config(_covered(hashing, folder)).sign(folder, place)
    return place


def check(folder: Path, public_key: Path) -> None:
    """VerificationError unless `.attest/model.sig` covers exactly the files of the folder, by this key."""
    _, verifying, hashing = _modules()
    place = folder / paths.ATTESTATIONS / NAME
    if not place.is_file():
        raise VerificationError(
            f"{place} is missing", hint="whoever publishes it must sign it: `enginewright sign --model-signing`"
        )
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(_covered(hashing, folder)).verify(folder, place)
    except Exception as error:  # the package raises errors of many libraries
        raise VerificationError(f"{place} does not hold: {error!s:.500}", hint="do not use the artifact") from error


def _covered(hashing: Any, folder: Path) -> Any:
    """Every file but the attestations; also those that git would ignore."""
    return hashing.Config().set_ignored_paths(paths=[folder / paths.ATTESTATIONS], ignore_git_paths=False)


def _modules() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise UnavailableError(
            f"the package 'model-signing' is not here: {error}", hint="pip install 'enginewright[model-signing]'"
        ) from error
    return signing, verifying, hashing
