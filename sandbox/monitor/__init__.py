"""Monitors that stand on their own: resources of a process, files of a folder, a network. They must not know plugins."""
