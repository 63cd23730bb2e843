"""Takes memory and gives none back; its manifest has more for a second try."""


def main():
    held = []
    while True:
        held.append(bytearray(b"x") * (1 << 20))
