"""A server as a compose file, or as Kubernetes' Deployment and Service: values for yaml.safe_dump."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.serve.external import Server

START_S = 600
"""A large model may take so long to load."""
REQUEST_SHARE, REQUEST_BYTES = 1.3, 512 << 20
"""What a pod asks for of memory: what its files take, a little more, and a runtime. No limit is set: caches grow with
the load, and a limit kills what serves."""


def compose(server: Server, artifact: Path) -> dict[str, Any]:
    """A compose file with one service, on loopback, over the artifact read-only."""
    service: dict[str, Any] = {
        "image": server.image,
        "command": list(server.arguments),
        "ports": [f"127.0.0.1:{server.port}:{server.port}"],
        "volumes": [{"type": "bind", "source": str(artifact.resolve()), "target": server.mount, "read_only": True}],
        "restart": "unless-stopped",
    }
    if server.environment:
        service["environment"] = dict(server.environment)
    if server.gpus:
        device = {"driver": "nvidia", "count": server.gpus, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
        service["ipc"] = "host"  # ranks talk through shared memory
    # Without a `name`: docker-compose before version 2 knows none.
    return {"services": {label(f"{server.name}-{server.framework}"): service}}


def kubernetes(server: Server, claim: str) -> list[dict[str, Any]]:
    """Deployment and Service. `claim` is the PersistentVolumeClaim that holds the artifact at its root."""
    name = label(f"{server.name}-{server.framework}")
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": label(server.name)}
    container: dict[str, Any] = {
        "name": label(server.framework),
        "image": server.image,
        "args": list(server.arguments),
        "ports": [{"name": "http", "containerPort": server.port}],
        "env": [{"name": key, "value": value} for key, value in server.environment.items()],
        "startupProbe": {**_get(server.live), "periodSeconds": 5, "failureThreshold": START_S // 5},
        "readinessProbe": {**_ready(server), "periodSeconds": 10, "timeoutSeconds": 10},
        "livenessProbe": {**_get(server.live), "periodSeconds": 10, "failureThreshold": 6},
        "volumeMounts": [{"name": "artifact", "mountPath": server.mount, "readOnly": True}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    volumes: list[dict[str, Any]] = [
        {"name": "artifact", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
    ]
    memory = (int(server.size_bytes * REQUEST_SHARE) + REQUEST_BYTES) >> 20
    container["resources"] = {"requests": {"cpu": "1", "memory": f"{memory}Mi"}}
    if server.gpus:
        container["resources"]["limits"] = {"nvidia.com/gpu": server.gpus}
        container["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app.kubernetes.io/name": name}},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 90},
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "selector": {"app.kubernetes.io/name": name},
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }
    return [deployment, service]


def label(text: str) -> str:
    """A DNS label."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].rstrip("-")


def _get(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http"}}


def _ready(server: Server) -> dict[str, Any]:
    if server.ready:
        return _get(server.ready)
    if server.framework in ("vllm", "turbomind"):  # the probe travels with the artifact: one real token
        command = ["python3", f"{server.mount}/probe.py", "wait", f"http://127.0.0.1:{server.port}", "8"]
        return {"exec": {"command": command}}
    return _get(server.live)
