"""Monitors that stand on their own: resources of a process, files of a folder, a network. They must not know plugins."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox.config import IsolationConfig


class FilesystemWatchdog:
    """Filesystem monitoring and access control.

    Raises:
        NotImplementedError: always, in this version.
    """

    def __init__(self, sandbox_directory: str, config: IsolationConfig) -> None:
        raise NotImplementedError("FilesystemWatchdog is not part of this version yet")


class NetworkIsolationManager:
    """Network isolation and monitoring.

    Raises:
        NotImplementedError: always, in this version.
    """

    def __init__(self, config: IsolationConfig) -> None:
        raise NotImplementedError("NetworkIsolationManager is not part of this version yet")
