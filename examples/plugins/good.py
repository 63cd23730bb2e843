"""Does what it should."""


def main(env):
    return sorted(env)[0]
