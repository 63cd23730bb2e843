"""Has modules and data of its own."""

import os

from parts.words import last


def run():
    with open(os.path.join(os.path.dirname(__file__), "words.txt")) as file:
        return last(file.read())
