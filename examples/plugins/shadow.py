"""Reads the passwords of the host."""


def main():
    return open("/etc/shadow").read()
