"""The API reference's module name: every public name of the package `sandbox`, and nothing else.

The names are imported when they are first used, as in `sandbox` itself.
"""

from __future__ import annotations

import sandbox as _sandbox
from sandbox import __all__ as __all__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox import *  # noqa: F403


if not TYPE_CHECKING:  # or a type checker would take any name for good

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(_sandbox, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
