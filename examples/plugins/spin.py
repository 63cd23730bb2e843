"""Uses all the CPU time that it can get."""


def main():
    while True:
        pass
