"""All families of attacks: importing this registers every attack."""

from __future__ import annotations

from sandbox.selftest import files, granted, kernel, limits, mounts, neighbours, network, process, system

__all__ = ["files", "granted", "kernel", "limits", "mounts", "neighbours", "network", "process", "system"]
