"""A module of the plugin's own."""


def last(text):
    return text.split()[-1]
