"""Fills its workspace."""


def main():
    for number in range(1000):
        with open(f"{number}", "wb") as file:
            file.write(bytes(1 << 20))
