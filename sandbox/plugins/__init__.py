"""Plugin folders: manifests, discovery, the framework. It must not know how a sandbox is built."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox.config import IsolationConfig


class EnhancedPluginFramework:
    """Enhanced plugin framework with integrated sandbox isolation.

    Raises:
        NotImplementedError: always, in this version.
    """

    def __init__(self, plugin_dir: str, config: IsolationConfig | None = None) -> None:
        raise NotImplementedError("EnhancedPluginFramework is not part of this version yet")
