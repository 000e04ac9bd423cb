"""Who we are to a registry, and over what line: credentials, helpers, tokens, TLS; and the referrers API."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.errors import RecipeError
from pipeline.registry import auth, credentials, media, reference
from pipeline.registry.origin import is_loopback
from pipeline.registry.remote import Remote
from tests.registry.door import enginewright, ok, refused
from tests.registry.proxy import Proxy
from tests.registry.server import Registry
from tests.registry.test_faults import login


@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_credentials_of_docker_login(
    proxy: Proxy, repository: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    proxy.auth = kind
    ref = f"{proxy.address}/{repository}:1"
    refused(enginewright("push", made, ref), 7, "does not know you", "docker login")
    login(tmp_path, monkeypatch, proxy.address, "wrong")
    done = enginewright("push", made, ref)
    refused(done, 7, "401")
    assert "wrong" not in done.err
    login(tmp_path, monkeypatch, proxy.address)
    ok("push", made, ref)
    ok("pull", ref, "--out", tmp_path)
    asked = proxy.asked("GET", "^/token")
    assert bool(asked) == (kind == "bearer")
    # One challenge a command, not one a request.
    proxy.log.clear()
    ok("ls", ref)
    assert len([r for r in proxy.log if "authorization" not in r.headers]) == 1


def test_credentials_of_the_environment(
    proxy: Proxy, repository: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.auth = "basic"
    monkeypatch.setenv("ENGINEWRIGHT_REGISTRY_USER", "wright")
    monkeypatch.setenv("ENGINEWRIGHT_REGISTRY_PASSWORD", "right")
    ref = f"{proxy.address}/{repository}:1"
    refused(enginewright("push", made, ref), 7, "does not know you", "ENGINEWRIGHT_REGISTRY")
    monkeypatch.setenv("ENGINEWRIGHT_REGISTRY", proxy.address)
    ok("push", made, ref)


def test_a_credential_helper(
    proxy: Proxy, repository: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.auth = "basic"
    helper = tmp_path / "bin" / "docker-credential-test"
    helper.parent.mkdir()
    helper.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = get ] && [ "$(cat)" = "{proxy.address}" ] &&\n'
        """  echo '{"Username":"wright","Secret":"right"}' && exit\n"""
        "echo 'credentials not found in native keychain'; exit 1\n"
    )
    helper.chmod(0o755)
    config = tmp_path / "docker" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"credHelpers": {proxy.address: "test"}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(config.parent))
    ref = f"{proxy.address}/{repository}:1"
    refused(enginewright("push", made, ref), 7, "docker-credential-test is not installed")
    monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin")
    ok("push", made, ref)
    assert credentials.find("other.example.org") is None
    config.write_text(json.dumps({"credsStore": "test"}))
    assert credentials.find("other.example.org") is None
    config.write_text('{"credHelpers": {"x.org": "../evil"}}')
    with pytest.raises(RecipeError, match="no name of a credential helper"):
        credentials.find("x.org")
    config.write_text("{")
    refused(enginewright("push", made, ref), 64, str(config), "log in again")


def test_docker_hub_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    login(tmp_path, monkeypatch, "https://index.docker.io/v1/")
    for name in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        client = Remote(reference.parse(f"{name}/org/model:1")).client
        assert client.base == "https://registry-1.docker.io"
        found = credentials.find(client.host)
        assert found and found.user == "wright" and "right" not in repr(found).replace("wright", "")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ('Basic realm="a b"', {"basic": {"realm": "a b"}}),
        (
            'Bearer realm="https://a/token",service="s",scope="repository:x/y:pull,push"',
            {"bearer": {"realm": "https://a/token", "service": "s", "scope": "repository:x/y:pull,push"}},
        ),
        ('bearer realm=https://a, Basic realm="b"', {"bearer": {"realm": "https://a"}, "basic": {"realm": "b"}}),
        ("Negotiate", {"negotiate": {}}),
        ("", {}),
    ],
)
def test_challenges(header: str, found: dict[str, dict[str, str]]) -> None:
    assert auth.challenges(header) == found


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of an authority of its own for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True)
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def test_tls(registry: Registry, repository: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with Proxy(registry.address, tls=context) as proxy:
        ref = f"https://{proxy.address}/{repository}:1"
        refused(enginewright("push", made, ref), 7, "TLS failed", "SSL_CERT_FILE")
        assert not proxy.log
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        ok("push", made, ref)
        ok("pull", ref, "--out", tmp_path)


def test_nothing_goes_over_a_network_in_the_clear(made: Path) -> None:
    refused(enginewright("push", made, "http://registry.example.org/x:1"), 64, "in the clear", "--plain-http")
    assert [is_loopback(host) for host in ("localhost:1", "127.0.0.1", "127.1.2.3:5", "[::1]:5", "a.localhost")] == [
        True
    ] * 5
    assert not [
        host
        for host in ("10.0.0.1:5", "registry.example.org", "localhost.example.org", "127.0.0.1.example.org", "[::2]:5")
        if is_loopback(host)
    ]


def test_a_proxy_of_the_environment_is_used(
    registry: Registry, repository: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = f"{registry.address}/{repository}:1"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    refused(enginewright("push", made, ref), 7, "cannot be reached")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    ok("push", made, ref)


def test_a_registry_that_is_not_there() -> None:
    refused(enginewright("pull", "127.0.0.1:9/x:1"), 7, "cannot be reached", "check the address")
    refused(enginewright("ls", "127.0.0.1:9/x"), 7, "cannot be reached")


class Native:
    """A registry that keeps lists of referrers by itself (OCI 1.1), in memory; no Debian package has one yet."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _native(self))
        self.address = f"127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Native:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def _native(state: Native) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def send(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer(self) -> None:
            state.asked.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind, _, name = self.path.partition("/v2/x/")[2].partition("/")
            digest = media.described("", body).digest
            if kind == "blobs" and self.command == "POST":
                self.send(202, Location="/v2/x/blobs/uploads/1?state=a%20b")
            elif kind == "blobs" and self.command == "PUT":
                assert "?state=a%20b&" in self.path and self.path.endswith(digest.replace(":", "%3A"))
                state.blobs[digest] = body
                self.send(201)
            elif kind == "blobs":
                found = state.blobs.get(name)
                self.send(200 if found is not None else 404, found or b"")
            elif kind == "manifests" and self.command == "PUT":
                state.manifests[digest] = body
                state.tags[name] = digest
                more = {"OCI_Subject": "yes"} if "subject" in json.loads(body) else {}
                self.send(201, Docker_Content_Digest=digest, **more)
            elif kind == "manifests":
                data = state.manifests.get(state.tags.get(name, name))
                self.send(200 if data else 404, data or b"")
            elif kind == "referrers":
                # In pages of one, as a registry may.
                wanted, _, page = name.partition("?page=")
                refer = [
                    media.described(media.MANIFEST, data, artifact_type=value["artifactType"]).plain()
                    for data in state.manifests.values()
                    if (value := json.loads(data)).get("subject", {}).get("digest") == wanted
                ]
                number = int(page or 0)
                more = {"Link": f'</v2/x/referrers/{wanted}?page={number + 1}>; rel="next"'}
                index = {"schemaVersion": 2, "manifests": refer[number : number + 1]}
                self.send(200, json.dumps(index).encode(), **(more if number + 1 < len(refer) else {}))
            else:
                self.send(200, json.dumps({"tags": sorted(state.tags)}).encode())

    for method in ("GET", "HEAD", "PUT", "POST"):
        setattr(Handler, f"do_{method}", Handler.answer)
    return Handler


def test_a_registry_with_the_referrers_api(registry: Registry, repository: str, made: Path, tmp_path: Path) -> None:
    """It is asked for its lists, and no tag of ours stands in for them; a copy to one without it has the tags."""
    ok("keygen", tmp_path / "key")
    with Native() as native:
        ref = f"{native.address}/x:1.0.0"
        ok("push", made, ref)
        ok("sign", ref, "--key", tmp_path / "key.key")
        digests = {tag for tag in native.tags if tag.startswith("sha256-") and "." not in tag}
        assert not digests
        ok("verify", ref, "--key", tmp_path / "key.pub")
        goal = f"{registry.address}/{repository}:1.0.0"
        ok("copy", ref, goal)
        ok("verify", goal, "--key", tmp_path / "key.pub")
        assert len([tag for tag in registry.tags(repository) if len(tag) == 71]) == 2
