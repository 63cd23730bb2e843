"""Reads memory that is not there."""

import ctypes


def main():
    return ctypes.string_at(0)
