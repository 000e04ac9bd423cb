"""Signatures and policies: whatever was changed, added, removed or belongs elsewhere is refused, and named."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifact import dsse
from pipeline.artifact.attest import statement
from pipeline.artifact.manifest import artifact_id
from pipeline.errors import RecipeError
from pipeline.registry import places
from pipeline.trust import keys, licenses
from pipeline.trust.sbom import CYCLONEDX, sbom
from pipeline.trust.sign import SIGNATURE, envelope
from tests.artifact.helpers import facts, rewrite
from tests.registry.door import Done, artifacts, enginewright, ok, refused


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys, a policy, and a signed artifact: release.key, release.pub, other.*, policy.yaml, tiny/cpu."""
    place = tmp_path_factory.mktemp("release")
    artifacts(place)
    ok("keygen", place / "release")
    ok("keygen", place / "other")
    (place / "policy.yaml").write_text(
        "require: [signature, parity, sbom]\nkeys: [release.pub]\nlicenses: [Apache-2.0, MIT]\n"
    )
    about = sbom(facts())
    artifact = place / "tiny" / "cpu"
    identity = artifact_id((artifact / "manifest.json").read_bytes())
    said = statement(about.predicate_type, identity, about.predicate)
    (artifact / ".attest" / "sbom.json").write_text(json.dumps(said))
    ok("sign", artifact, "--key", place / "release.key")
    return place


@pytest.fixture
def signed(release: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may spoil."""
    shutil.copytree(release / "tiny" / "cpu", tmp_path / "cpu")
    return tmp_path / "cpu"


def verify(release: Path, where: object, *more: object) -> Done:
    return enginewright("verify", where, "--policy", release / "policy.yaml", *more)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    rewrite(path, bytes(data))


def test_a_signed_artifact_is_accepted(release: Path, signed: Path) -> None:
    done = verify(release, signed, "--format", "json")
    assert done.code == 0, done.err
    assert [(each["demand"], each["ok"]) for each in done.json["policy"]] == [
        ("signature", True),
        ("parity", True),
        ("sbom", True),
        ("licenses", True),
    ]


def payload(path: Path, change: Callable[[Any], object]) -> None:
    """Change what an envelope says, and leave its signature."""
    envelope = json.loads(path.read_bytes())
    said = json.loads(base64.b64decode(envelope["payload"]))
    change(said)
    envelope["payload"] = base64.b64encode(json.dumps(said).encode()).decode()
    path.write_text(json.dumps(envelope))


def signature_byte(path: Path) -> None:
    """Change one bit of a signature."""
    envelope = json.loads(path.read_bytes())
    value = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    value[5] ^= 1
    envelope["signatures"][0]["sig"] = base64.b64encode(value).decode()
    path.write_text(json.dumps(envelope))


OTHER = f"sha256:{'0' * 64}"
SPOILT: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "one byte of a file": (lambda a, r: flip(a / "model.onnx"), "model.onnx: has other contents"),
    "a file added": (lambda a, r: (a / "evil.py").write_text("x"), "'evil.py': is not in the manifest"),
    "a file removed": (lambda a, r: (a / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "the manifest and a file, fitting": (
        lambda a, r: (
            rewrite(a / "manifest.json", (a / "manifest.json").read_bytes().replace(b'"A test."', b'"A toast"')),
        ),
        "speaks of another artifact",
    ),
    "the signature removed": (
        lambda a, r: (a / ".attest/signature.dsse").unlink(),
        "signature: .attest/signature.dsse is missing",
    ),
    "the parity removed": (lambda a, r: (a / ".attest/parity.dsse").unlink(), ".attest/parity.dsse is missing"),
    "parity of the envelope alone": (
        lambda a, r: ((a / ".attest/parity.dsse").unlink(), (a / ".attest/parity.json").unlink()),
        ".attest/parity.dsse is missing",
    ),
    "one byte of an attestation": (
        lambda a, r: payload(a / ".attest/parity.dsse", lambda said: said["predicate"].update(samples=999)),
        ".attest/parity.dsse: its signature is wrong",
    ),
    "one byte of a signature": (
        lambda a, r: signature_byte(a / ".attest/signature.dsse"),
        ".attest/signature.dsse: its signature is wrong",
    ),
    "an attestation of another artifact": (
        lambda a, r: (a / ".attest/parity.dsse").write_bytes(
            envelope(json.dumps(statement("x", OTHER, {})).encode(), keys.private_key(r / "release.key"))
        ),
        ".attest/parity.dsse': speaks of another artifact",
    ),
    "an attestation under another's name": (
        lambda a, r: shutil.copy(a / ".attest/sbom.dsse", a / ".attest/parity.dsse"),
        "parity: .attest/parity.dsse is missing",
    ),
    "an envelope that is none": (
        lambda a, r: (a / ".attest/parity.dsse").write_text("{}"),
        ".attest/parity.dsse': is not a DSSE envelope",
    ),
    "an envelope without a signature": (
        lambda a, r: (a / ".attest/parity.dsse").write_text(
            json.dumps({**json.loads((a / ".attest/parity.dsse").read_text()), "signatures": []})
        ),
        "has no signature",
    ),
}


@pytest.mark.parametrize(("spoil", "told"), SPOILT.values(), ids=list(SPOILT))
def test_what_was_changed_is_refused_and_named(
    release: Path, signed: Path, spoil: Callable[[Path, Path], object], told: str
) -> None:
    spoil(signed, release)
    refused(verify(release, signed), 6, told)


def test_another_key(release: Path, signed: Path) -> None:
    done = enginewright("verify", signed, "--key", release / "other.pub")
    refused(done, 6, ".attest/signature.dsse: signed by", "which the policy does not allow")
    # The name of a key is a hint: claiming to be the allowed one is of no use.
    other = keys.private_key(release / "other.key")
    good = keys.public_key(release / "release.pub").key_id
    said = dsse.decode((signed / ".attest/signature.dsse").read_bytes()).payload
    lie = dsse.encode(said, [dsse.Signature(good, other.sign(dsse.signed_bytes(said)))])
    (signed / ".attest/signature.dsse").write_bytes(lie)
    refused(verify(release, signed), 6, "its signature is wrong")


def test_a_signature_that_expired(release: Path, signed: Path) -> None:
    (signed / ".attest/signature.dsse").unlink()
    ok("sign", signed, "--key", release / "release.key", "--expires", "0s")
    refused(verify(release, signed), 6, "signature.dsse expired at")
    ok("sign", signed, "--key", release / "release.key", "--expires", "1d")
    assert verify(release, signed).code == 0


def test_a_deferred_or_failed_proof_is_not_enough(release: Path, tmp_path: Path) -> None:
    made = artifacts(tmp_path)
    ok("sign", made / "cuda-sm90", "--key", release / "release.key")
    policy = tmp_path / "policy.yaml"
    shutil.copy(release / "release.pub", tmp_path)
    policy.write_text("require: [parity]\nkeys: [release.pub]\n")
    refused(enginewright("verify", made / "cuda-sm90", "--policy", policy), 6, "parity.dsse says deferred, not passed")
    # A second proof that failed outweighs one that passed.
    ok("sign", made / "cpu", "--key", release / "release.key")
    assert enginewright("verify", made / "cpu", "--policy", policy).code == 0
    said = json.loads((made / "cpu/.attest/parity.json").read_text())
    said["predicate"]["result"] = "FAILED"
    (made / "cpu/.attest/parity-golden.json").write_text(json.dumps(said))
    ok("sign", made / "cpu", "--key", release / "release.key")
    refused(enginewright("verify", made / "cpu", "--policy", policy), 6, "parity-golden.dsse says that it failed")


def test_licences(release: Path, signed: Path, tmp_path: Path) -> None:
    shutil.copy(release / "release.pub", tmp_path)
    policy = tmp_path / "policy.yaml"
    policy.write_text("require: [signature]\nkeys: [release.pub]\nlicenses: [MIT]\n")
    refused(enginewright("verify", signed, "--policy", policy), 6, "licenses: Apache-2.0 is not among MIT")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("require: [signature]\n", "keys is missing"),
        ("keys: [release.pub]\n", "require is missing"),
        ("require: []\nkeys: [release.pub]\n", "require is empty"),
        ("require: [signature]\nkeys: []\n", "keys is empty"),
        ("require: [signature]\nkeys: [release.pub]\nlicenses: []\n", "licenses is empty"),
        ("require: [signatur]\nkeys: [release.pub]\n", "'signatur' is not known"),
        ("require: [signature]\nkeys: [release.pub]\nallow: all\n", "unknown field 'allow'"),
        ("require: [signature]\nrequire: [sbom]\nkeys: [release.pub]\n", "'require' stands twice"),
        ("require: signature\nkeys: [release.pub]\n", "require is not a list"),
        ("require: [signature]\nkeys: [none.pub]\n", "none.pub cannot be read"),
        ("require: [signature]\nkeys: [release.key]\n", "is a private key"),
        ("require: [signature]\nkeys: [policy.yaml]\n", "is not a public key"),
        ("require: [signature\n", "is not a policy"),
        ("!!python/object/apply:os.system [true]\n", "is not a policy"),
        ("", "is not a policy"),
        ("[1]\n", "is not a policy"),
    ],
)
def test_a_policy_that_is_not_understood_lets_nothing_pass(
    release: Path, signed: Path, tmp_path: Path, text: str, told: str
) -> None:
    for name in ("release.pub", "release.key"):
        shutil.copy(release / name, tmp_path)
    (tmp_path / "policy.yaml").write_text(text)
    refused(enginewright("verify", signed, "--policy", tmp_path / "policy.yaml"), 64, told)


def test_a_version_in_a_registry_is_held_to_the_policy_before_its_files_come(
    release: Path, signed: Path, tmp_path: Path
) -> None:
    ref = f"oci:{tmp_path}/layout:1"
    ok("push", signed, ref)
    ok("pull", ref, "--out", tmp_path / "good", "--policy", release / "policy.yaml")
    refused(enginewright("pull", ref, "--out", tmp_path / "bad", "--key", release / "other.pub"), 6, "signature.dsse")
    assert not (tmp_path / "bad").exists()
    refused(verify(release, f"oci:{tmp_path}/none:1"), 7, "is not there")
    # Attestations stripped off: the same bytes, and refused.
    shutil.rmtree(signed / ".attest")
    ok("push", signed, f"oci:{tmp_path}/bare:1")
    refused(
        enginewright("pull", f"oci:{tmp_path}/bare:1", "--out", tmp_path / "bad", "--policy", release / "policy.yaml"),
        6,
        "signature: .attest/signature.dsse is missing",
        "parity: .attest/parity.dsse is missing",
    )
    assert not (tmp_path / "bad").exists()


def test_a_tag_that_was_moved(release: Path, tmp_path: Path) -> None:
    one, two = artifacts(tmp_path / "a"), artifacts(tmp_path / "b", weights=b"other " * 1000)
    ref = f"oci:{tmp_path}/layout:stable"
    pinned = ok("push", one, ref, "--format", "json").json["reference"]
    ok("verify", pinned)
    now = ok("push", two, ref, "--force-tag", "--format", "json").json["digest"]
    for verb in (("verify",), ("pull", "--target", "cpu", "--out", tmp_path / "out"), ("inspect",)):
        refused(enginewright(verb[0], pinned, *verb[1:]), 6, "the tag stable stands for", now)
    assert not (tmp_path / "out").exists()
    ok("verify", pinned.replace(":stable@", "@"))
    places.local(tmp_path, "x")
    refused(enginewright("verify", pinned.replace(":stable@", ":gone@")), 6, "the tag gone is gone")


def test_an_attestation_that_was_tied_to_the_wrong_artifact(release: Path, signed: Path, tmp_path: Path) -> None:
    """In a registry anybody who may write can add a referrer: one that speaks of something else is told."""
    from pipeline.registry import attestations, media, reference
    from pipeline.registry.stream import of_bytes

    ref = f"oci:{tmp_path}/layout:1"
    ok("push", signed, ref)
    repository = places.reading(reference.parse(ref), tmp_path)
    (child,) = json.loads(repository.manifest("1")[1])["manifests"]
    data = json.dumps(statement("x", OTHER, {})).encode()
    blob, manifest = attestations.packed("parity.json", data, media.descriptor(child, "x"))
    repository.write_blob(blob, of_bytes(data))
    repository.attach([manifest], child["digest"])
    refused(verify(release, ref), 6, "parity.json", "speaks of another artifact")
    refused(enginewright("pull", ref, "--target", "cpu", "--out", tmp_path / "out"), 6, "parity.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["ed25519", "p256", "p384"])
def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    ok("keygen", tmp_path / "k", "--kind", kind)
    assert (tmp_path / "k.key").stat().st_mode & 0o777 == 0o600
    refused(enginewright("keygen", tmp_path / "k"), 64, "is there already")
    key = keys.private_key(tmp_path / "k.key")
    public = keys.public_key(tmp_path / "k.pub")
    assert public.key_id == key.public.key_id
    signature = key.sign(b"data")
    assert public.accepts(signature, b"data")
    assert not public.accepts(signature, b"date")
    assert not public.accepts(b"", b"data")
    # By the environment, encrypted.
    monkeypatch.setenv(keys.PASSWORD_VARIABLE, "secret")
    ok("keygen", tmp_path / "e", "--kind", kind)
    assert b"ENCRYPTED" in (tmp_path / "e.key").read_bytes()
    monkeypatch.setenv(keys.KEY_VARIABLE, (tmp_path / "e.key").read_text())
    assert keys.private_key(None).public.key_id == keys.public_key(tmp_path / "e.pub").key_id
    monkeypatch.setenv(keys.PASSWORD_VARIABLE, "wrong")
    with pytest.raises(RecipeError, match="password is wrong"):
        keys.private_key(None)
    monkeypatch.delenv(keys.PASSWORD_VARIABLE)
    with pytest.raises(RecipeError, match="is encrypted"):
        keys.private_key(None)
    monkeypatch.delenv(keys.KEY_VARIABLE)
    with pytest.raises(RecipeError, match="no key to sign with"):
        keys.private_key(None)


def test_openssl_judges_keys_and_signatures(tmp_path: Path) -> None:
    """Another implementation reads our keys and accepts our signatures, and the other way round."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    ok("keygen", tmp_path / "k", "--kind", "p256")
    (tmp_path / "data").write_bytes(b"data")
    (tmp_path / "sig").write_bytes(keys.private_key(tmp_path / "k.key").sign(b"data"))
    check = [
        openssl,
        "dgst",
        "-sha256",
        "-verify",
        tmp_path / "k.pub",
        "-signature",
        tmp_path / "sig",
        tmp_path / "data",
    ]
    assert subprocess.run(check, capture_output=True).returncode == 0
    make = f"{openssl} ecparam -name prime256v1 -genkey -noout -out t.key && {openssl} ec -in t.key -pubout -out t.pub"
    subprocess.run(["sh", "-c", make], cwd=tmp_path, check=True, capture_output=True)
    sign = [openssl, "dgst", "-sha256", "-sign", "t.key", "-out", "t.sig", "data"]
    subprocess.run(sign, cwd=tmp_path, check=True)
    assert keys.public_key(tmp_path / "t.pub").accepts((tmp_path / "t.sig").read_bytes(), b"data")
    assert keys.private_key(tmp_path / "t.key").public.accepts((tmp_path / "t.sig").read_bytes(), b"data")
    subprocess.run(["sh", "-c", f"{openssl} genrsa -out r.key 2048"], cwd=tmp_path, check=True, capture_output=True)
    with pytest.raises(RecipeError, match="kind that is not known"):
        keys.private_key(tmp_path / "r.key")


@pytest.mark.parametrize("kind", ["ed25519", "p256", "p384"])
def test_securesystemslib_judges_envelopes(tmp_path: Path, kind: str) -> None:
    """The reference implementation of DSSE accepts ours, and we accept its own."""
    from cryptography.hazmat.primitives import serialization
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

    ok("keygen", tmp_path / "k", "--kind", kind)
    key = keys.private_key(tmp_path / "k.key")
    said = json.dumps(statement(SIGNATURE, OTHER, {})).encode()
    made = json.loads(envelope(said, key))
    theirs = SSlibKey.from_crypto(key.public.key, keyid=key.public.key_id)
    assert Envelope.from_dict(made).verify([theirs], 1)
    pem = (tmp_path / "k.key").read_bytes()
    signer = CryptoSigner(serialization.load_pem_private_key(pem, None), theirs)  # type: ignore[arg-type]
    foreign = Envelope(said, dsse.PAYLOAD_TYPE, {})
    foreign.sign(signer)
    read = dsse.decode(json.dumps(foreign.to_dict()).encode())
    assert read.payload == said
    assert key.public.accepts(read.signatures[0].value, dsse.signed_bytes(read.payload))
    assert dsse.problem(json.dumps(foreign.to_dict()).encode(), OTHER) is None


def test_cyclonedx_judges_the_bill(release: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    about = sbom(facts())
    assert about.predicate_type == CYCLONEDX
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(about.predicate)) is None
    assert sbom(facts()) == about
    names = {each["name"] for each in about.predicate["components"]}
    assert {"hf://org/tiny", "onnx", "onnxruntime"} <= names
    assert about.predicate["components"][0]["purl"] == f"pkg:huggingface/org/tiny@{'c' * 40}"
    twice = sbom(facts(licenses=("MIT", "Apache-2.0")))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(twice.predicate)) is None


@pytest.mark.parametrize(
    ("expression", "known", "good"),
    [
        ("MIT", ["MIT"], True),
        ("mit", ["MIT"], True),
        ("MIT OR GPL-3.0-only", ["MIT"], True),
        ("MIT AND GPL-3.0-only", ["MIT"], False),
        ("(MIT OR GPL-3.0-only) AND Apache-2.0", ["MIT", "Apache-2.0"], True),
        ("MIT OR (GPL-3.0-only AND Apache-2.0)", ["Apache-2.0"], False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ["GPL-2.0-only"], False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ["GPL-2.0-only WITH Classpath-exception-2.0"], True),
        ("MIT GPL-3.0-only", ["MIT"], False),
        ("(MIT", ["MIT"], False),
        ("MIT OR", ["MIT"], False),
        ("MIT; rm", ["MIT"], False),
        ("", ["MIT"], False),
        ("(" * 5000, ["MIT"], False),
    ],
)
def test_licence_expressions(expression: str, known: list[str], good: bool) -> None:
    assert licenses.allowed(expression, known) is good


@given(st.binary(max_size=200))
def test_no_bytes_are_taken_for_an_envelope(data: bytes) -> None:
    assert isinstance(dsse.problem(data, OTHER), str)


INTERPRETER = os.environ.get("ENGINEWRIGHT_TEST_MODEL_SIGNING", "")


@pytest.mark.optin
@pytest.mark.skipif(
    not INTERPRETER, reason="ENGINEWRIGHT_TEST_MODEL_SIGNING names a Python with model-signing and ours"
)
def test_openssf_model_signing_both_ways(release: Path, signed: Path, tmp_path: Path) -> None:
    """Their command accepts ours, ours accepts theirs, and both refuse a byte, an added and a missing file."""
    ok("keygen", tmp_path / "k", "--kind", "p256")
    ours, theirs = [INTERPRETER, "-m", "pipeline.cli.main"], [INTERPRETER, "-m", "model_signing"]
    place, sig = str(signed), str(signed / ".attest" / "model.sig")

    def run(*words: str) -> int:
        return subprocess.run(list(words), capture_output=True, text=True).returncode

    check = (*ours, "verify", place, "--key", str(tmp_path / "k.pub"), "--model-signing")
    ignored = ("--ignore-paths", str(signed / ".attest"), "--no-ignore-git-paths")
    assert run(*ours, "sign", place, "--key", str(tmp_path / "k.key"), "--model-signing") == 0
    assert run(*check) == 0
    public = ("--public_key", str(tmp_path / "k.pub"))
    judge = (*theirs, "verify", "key", place, "--signature", sig, *public, *ignored)
    assert run(*judge) == 0
    Path(sig).unlink()
    private = ("--private_key", str(tmp_path / "k.key"))
    assert run(*theirs, "sign", "key", place, *private, "--signature", sig, *ignored) == 0
    assert run(*check) == 0
    (signed / "evil.py").write_text("x")
    assert run(*check) == 6 and run(*judge) == 1
    (signed / "evil.py").unlink()
    flip(signed / "model.onnx")
    assert run(*check) == 6 and run(*judge) == 1
