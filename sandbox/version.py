"""The version, written down once: reading it from the package's metadata costs 50 ms at every start."""

__version__ = "0.1.0"
