"""An S3 server on this machine, of moto, in a process of its own: what boto3 and s3fs speak to, over HTTP."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.harness import wait_for
from tests.registry.server import closed_port

BUCKET = "store"
SERVE = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
app = DomainDispatcherApplication(create_backend_app)
run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=True)
"""


@dataclass(frozen=True)
class S3:
    """A server with one bucket."""

    address: str
    pid: int

    @property
    def env(self) -> dict[str, str]:
        """What a builder's environment says."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "builder",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def client(self) -> Any:
        """botocore, to look at the bucket without our code."""
        import botocore.session

        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.address,
            region_name="us-east-1",
            aws_access_key_id="judge",
            aws_secret_access_key="secret",
        )

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Name -> size in bytes."""
        found: dict[str, int] = {}
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
            found |= {each["Key"]: each["Size"] for each in page.get("Contents", ())}
        return found

    def read(self, name: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return data

    def write(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=name)


@contextlib.contextmanager
def running(root: Path) -> Iterator[S3]:
    """A server with an empty bucket."""
    root.mkdir(parents=True, exist_ok=True)
    port = closed_port()
    with (root / "s3.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], stdout=log, stderr=log, env=os.environ)
    served = S3(f"http://127.0.0.1:{port}", process.pid)

    def answers() -> bool:
        assert process.poll() is None, (root / "s3.log").read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(served.address):
            return True
        return False

    try:
        wait_for(answers, "the S3 server answers")
        served.client.create_bucket(Bucket=BUCKET)
        yield served
    finally:
        process.kill()
        process.wait()
