"""Counts the words of all .txt files in a folder, by the program wc, and writes the counts to a JSON file.

    wordcount.py FOLDER RESULT.json

See docs/learn.md: what such a plugin needs, and how psie finds it out.
"""

import json
import subprocess
import sys
from pathlib import Path


def count(path: Path) -> int:
    done = subprocess.run(["wc", "-w", str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def main() -> None:
    folder, result = Path(sys.argv[1]), Path(sys.argv[2])
    counts = {path.name: count(path) for path in sorted(folder.glob("*.txt"))}
    result.write_text(json.dumps(counts, indent=2) + "\n")
    print(f"{sum(counts.values())} words in {len(counts)} files")


if __name__ == "__main__":
    main()
