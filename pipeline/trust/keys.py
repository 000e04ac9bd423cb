"""Keys: Ed25519, or ECDSA on P-256 and P-384; PEM in a file or in the environment, never on the command line."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import RecipeError, StageError, UnavailableError
from pipeline.frozen import frozen

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
    Public = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey

Kind = Literal["ed25519", "p256", "p384"]
KEY_VARIABLE = "ENGINEWRIGHT_SIGNING_KEY"
PASSWORD_VARIABLE = "ENGINEWRIGHT_KEY_PASSWORD"
MAX_BYTES = 1 << 16


@frozen
class PublicKey:
    """A key that signatures are checked with. `key_id` is the SHA-256 of its SubjectPublicKeyInfo, in hex."""

    key_id: str
    where: str
    key: Public

    def accepts(self, signature: bytes, data: bytes) -> bool:
        """Whether the signature over `data` is of this key."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519

        try:
            if isinstance(self.key, ed25519.Ed25519PublicKey):
                self.key.verify(signature, data)
            else:
                self.key.verify(signature, data, ec.ECDSA(_hash(self.key.curve)))
        except InvalidSignature:
            return False
        return True


@frozen
class PrivateKey:
    """A key that signs."""

    public: PublicKey
    key: Private

    def sign(self, data: bytes) -> bytes:
        """The signature over `data`: DER for ECDSA, 64 bytes for Ed25519."""
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519

        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            return self.key.sign(data)
        return self.key.sign(data, ec.ECDSA(_hash(self.key.curve)))


def generate(kind: Kind, password: bytes | None = None) -> tuple[bytes, bytes]:
    """A new pair as PEM: the private key (PKCS 8, encrypted if there is a password) and the public one."""
    serialization, ed25519, ec = _modules()
    key: Any = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(_curve(kind))
    secrecy = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secrecy)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private, public


def private_key(path: Path | None) -> PrivateKey:
    """The signing key in a file, else in ENGINEWRIGHT_SIGNING_KEY. RecipeError when there is none, or it is no key."""
    serialization, _, _ = _modules()
    if path is not None:
        data, where = _read(path), str(path)
    elif text := os.environ.get(KEY_VARIABLE):
        data, where = text.encode(), KEY_VARIABLE
    else:
        raise RecipeError(
            "there is no key to sign with", hint=f"give --key FILE, or set {KEY_VARIABLE} to its PEM text"
        )
    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        key = serialization.load_pem_private_key(data, password.encode() if password else None)
    except TypeError:
        told = f"set {PASSWORD_VARIABLE}" if not password else f"unset {PASSWORD_VARIABLE}"
        what = "is encrypted" if not password else "is not encrypted, and a password is given"
        raise RecipeError(f"{where} {what}", hint=told) from None
    except Exception:  # the library raises its own and its backend's errors
        raise RecipeError(f"{where} is not a private key, or the password is wrong", hint=HINT) from None
    return PrivateKey(_public(key.public_key(), where), _known(key, where))


def public_key(path: Path) -> PublicKey:
    """The key in a PEM file. RecipeError for what is none; a private key is refused, as it must not lie about."""
    serialization, _, _ = _modules()
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise RecipeError(f"{path} is a private key", hint="give the public one: `enginewright keygen` wrote both")
    try:
        key = serialization.load_pem_public_key(data)
    except Exception:
        raise RecipeError(f"{path} is not a public key in PEM", hint=HINT) from None
    return _public(key, str(path))


def write_pair(place: Path, private: bytes, public: bytes) -> tuple[Path, Path]:
    """Write NAME.key (for its owner alone) and NAME.pub. RecipeError when one is there: a key is not overwritten."""
    paths = place.with_name(f"{place.name}.key"), place.with_name(f"{place.name}.pub")
    for path in paths:
        if path.exists():
            raise RecipeError(f"{path} is there already", hint="choose another name, or move it away")
    try:
        for path, data, mode in zip(paths, (private, public), (0o600, 0o644), strict=True):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as stream:
                stream.write(data)
    except OSError as error:
        raise StageError(
            f"{error.filename} cannot be written: {error.strerror}", hint="choose another place"
        ) from error
    return paths


HINT = "Ed25519, P-256 and P-384 in PEM are known here; `enginewright keygen NAME` makes a pair"


def _public(key: Any, where: str) -> PublicKey:
    serialization, _, _ = _modules()
    known = _known(key, where)
    spki = known.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(hashlib.sha256(spki).hexdigest(), where, known)


def _known(key: Any, where: str) -> Any:
    """The key, if it is of a kind that is known here."""
    _, ed25519, ec = _modules()
    if isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return key
    raise RecipeError(f"{where} is a key of a kind that is not known here", hint=HINT)


_CURVES = {"secp256r1": "p256", "secp384r1": "p384"}


def _curve(kind: Kind) -> Any:
    _, _, ec = _modules()
    return ec.SECP256R1() if kind == "p256" else ec.SECP384R1()


def _hash(curve: Any) -> Any:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA384() if curve.name == "secp384r1" else hashes.SHA256()


def _modules() -> tuple[Any, Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    except ImportError as error:
        raise UnavailableError(
            f"signatures need the package 'cryptography': {error}", hint="pip install 'enginewright[sign]'"
        ) from error
    return serialization, ed25519, ec


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", hint="give the file of a key in PEM") from None
