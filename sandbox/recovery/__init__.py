"""Recovery from violations: roll back, quarantine, history. It must not know how a sandbox is built."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox.config import IsolationConfig


class SandboxRecoveryManager:
    """Automatic recovery and rollback management.

    Raises:
        NotImplementedError: always, in this version.
    """

    def __init__(self, config: IsolationConfig | None = None) -> None:
        raise NotImplementedError("SandboxRecoveryManager is not part of this version yet")
