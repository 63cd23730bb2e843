"""`python -m benchmarks.network`: what a connection to an allowed host costs more than a plain one, per level.

Medians over many connections to a server on the loopback, each made and closed again, in a plain process and in a sandbox of
each level, a few of each in turn. A connection of a sandbox is made by its supervisor: two notifications, one for the
socket and one for the connection. Blocking and non-blocking (as with a timeout).
"""

from __future__ import annotations

import asyncio
import statistics
import threading
from concurrent.futures import ProcessPoolExecutor
from socket import create_server

from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2

ROUNDS = 5
CONNECTIONS = 200
LIMITS = PluginLimitsV2(max_network_requests=10_000, max_cpu_percent=400.0)


def connections(port: int, timeout: float | None, count: int) -> list[float]:
    """Seconds of each."""
    import socket
    import time

    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout):
            seconds.append(time.perf_counter() - start)
    return seconds


async def measure(port: int, timeout: float | None) -> dict[str, float]:
    """Median microseconds by place."""
    permissions = PluginPermissionsV2(allow_network_access=True, allowed_hosts=[f"127.0.0.1:{port}"])
    seen: dict[str, list[float]] = {}
    with ProcessPoolExecutor(1) as plain:
        for _ in range(ROUNDS):
            seen.setdefault("plain", []).extend(plain.submit(connections, port, timeout, CONNECTIONS).result())
            for level in IsolationLevel:
                async with EnhancedPluginSandbox(LIMITS, permissions, IsolationConfig(level=level)) as sandbox:
                    seconds = await sandbox.execute_plugin_safe(connections, port, timeout, CONNECTIONS)
                    seen.setdefault(level.value, []).extend(seconds)
    return {place: statistics.median(values) * 1e6 for place, values in seen.items()}


def main() -> None:
    with create_server(("127.0.0.1", 0), backlog=4096) as server:

        def accept() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        port = server.getsockname()[1]
        print(f"A connection on the loopback, made and closed: median of {ROUNDS * CONNECTIONS}, us; limit: plain + 500")
        print(f"{'':10}" + "".join(f"{place:>12}" for place in ("plain", *(level.value for level in IsolationLevel))))
        for name, timeout in (("blocking", None), ("timeout", 5.0)):
            values = asyncio.run(measure(port, timeout))
            print(f"{name:10}" + "".join(f"{value:12.0f}" for value in values.values()))


if __name__ == "__main__":
    main()
