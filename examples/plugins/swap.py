"""Changes itself for the next run."""


def main():
    with open(__file__, "w") as file:
        file.write("def main(): return 'swapped'")
