"""Namespaces and what goes with them: system calls, ids, privileges, mounts, the network, the workspace."""
