"""Monitors that stand on their own: resources of a process, files of a folder, a network. They must not know plugins."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox.config import IsolationConfig


class NetworkIsolationManager:
    """Network isolation and monitoring.

    Raises:
        NotImplementedError: always, in this version.
    """

    def __init__(self, config: IsolationConfig) -> None:
        raise NotImplementedError("NetworkIsolationManager is not part of this version yet")
