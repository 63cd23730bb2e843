"""Fork handlers of preloaded modules (os.register_at_fork), put off until a process is to run a plugin.

CPython runs them in every forked child, where they write to a hundred pages of the zygote: half a megabyte and half a
millisecond for each warden and init, which need none of it. The zygote collects them instead of registering them; a worker
registers them when it is sealed, so that forks of the plugin run them, and makes up for those that it has missed itself.
Must not import anything heavy.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Hooks = dict[str, Callable[[], object]]

# They reset locks and lists of threads, which in a process that never had a second thread are as new.
WITHOUT_EFFECT = ("threading", "logging")

_register = os.register_at_fork
_collected: list[Hooks] = []


def collect(**hooks: Callable[[], object]) -> None:
    _collected.append(hooks)


def begin() -> None:
    """In the zygote, before the preloads: from now on handlers are collected."""
    os.register_at_fork = collect  # type: ignore[assignment]


def end() -> None:
    """In the zygote, after the preloads."""
    os.register_at_fork = _register


def make_up() -> None:
    """In a sealed worker: register what was collected, and run what an os.fork() of this process would have run."""
    for hooks in _collected:
        _register(**hooks)
        after = hooks.get("after_in_child")
        if after is not None and after.__module__ not in WITHOUT_EFFECT:
            after()
    reseed()


def reseed() -> None:
    """numpy seeds its global generator when it is imported and has no handler for forks: every worker would draw the same
    numbers, which a plugin of one call could foretell for the next. The generators of random are seeded by their handler.
    """
    generator = sys.modules.get("numpy.random")
    if generator is not None:
        generator.seed()
