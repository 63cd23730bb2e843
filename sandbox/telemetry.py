"""What was measured about one sandbox.

Only the container: it must not know how anything in it is measured, stored or shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import datetime

from sandbox.violations import SandboxViolation, to_plain, to_utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:
    Any = object  # so that typing.get_type_hints works without typing being loaded here

KEPT = 10_000  # samples, and processes: the oldest go


@dataclass
class SandboxTelemetry:
    """Telemetry of one sandbox.

    Attributes:
        sandbox_id: which sandbox.
        plugin_id: which plugin it ran; may come from the plugin, so escape it before showing it.
        start_time: when it began; kept in UTC. A datetime without a zone is taken as local time.
        end_time: when the last call ended, likewise; None while none has.
        peak_memory_mb: highest memory use, in megabytes of 2**20 bytes.
        peak_cpu_percent: highest CPU use, in percent of one CPU.
        file_operations_count: file operations counted.
        network_operations_count: network operations counted.
        violations: the violations, oldest first.
        resource_samples: the last 10,000 samples, oldest first.
        process_hierarchy: the last 10,000 processes seen, one dict for each.
        exit_code: exit status of the plugin's process; None while there is none.
        exit_reason: why it ended, in words.
        cleanup_successful: whether nothing of the sandbox was left behind.
        link_counters: rx_bytes, rx_packets, tx_bytes and tx_packets of the empty link that a sandbox of level maximum has;
            empty at other levels. Allowed connections do not go over it.

    Raises:
        TypeError: `start_time` or `end_time` is not a datetime.
    """

    sandbox_id: str
    plugin_id: str
    start_time: datetime
    end_time: datetime | None = None
    peak_memory_mb: float = 0.0
    peak_cpu_percent: float = 0.0
    file_operations_count: int = 0
    network_operations_count: int = 0
    violations: list[SandboxViolation] = field(default_factory=list)
    resource_samples: list[dict[str, Any]] = field(default_factory=list)
    process_hierarchy: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    exit_reason: str = ""
    cleanup_successful: bool = False
    link_counters: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start_time = to_utc("SandboxTelemetry.start_time", self.start_time)
        if self.end_time is not None:
            self.end_time = to_utc("SandboxTelemetry.end_time", self.end_time)

    def to_dict(self) -> dict[str, Any]:
        """The telemetry as plain data that `json.dumps` takes; the keys are the fields, times are in ISO 8601."""
        return {item.name: to_plain(getattr(self, item.name)) for item in fields(self)}
