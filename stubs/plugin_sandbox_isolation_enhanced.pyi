"""For type checkers: a single module cannot say itself that it has types, so the wheel has this beside it (PEP 561)."""

from sandbox import *  # noqa: F403
from sandbox import __all__ as __all__
