"""Registries: artifacts as OCI manifests, pushed, pulled by hardware, promoted and copied; layouts for offline use."""
