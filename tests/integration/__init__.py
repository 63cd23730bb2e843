"""Tests of the whole engine on a real kernel, through the Python door."""
