"""Uses some of everything, for a few seconds: memory, CPU, processes, files, and a network that it may not have.

psie run examples/busy.py --allow-subprocess --report busy.html [--rw FOLDER -- FOLDER]
"""

import hashlib
import os
import socket
import subprocess
import sys
import time


def compute(seconds: float, share: float) -> None:
    """Keep a part of one CPU busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stop = time.monotonic() + 0.05 * share
        while time.monotonic() < stop:
            hashlib.sha256(b"x" * 4096).digest()
        time.sleep(0.05 * (1 - share))


def write_files(folder: str, count: int) -> None:
    os.makedirs(f"{folder}/results/parts", exist_ok=True)
    for number in range(count):
        with open(f"{folder}/results/parts/{number}.txt", "w") as file:
            file.write(f"part {number}\n" * 100 * (number + 1))
    os.rename(f"{folder}/results/parts/0.txt", f"{folder}/results/first.txt")
    os.remove(f"{folder}/results/parts/1.txt")


def call_home(address: tuple[str, int]) -> None:
    try:
        with socket.create_connection(address, timeout=1):
            print("connected to", address)
    except OSError as error:
        print("no connection to", address, "-", error)


def start_children(count: int) -> list[subprocess.Popen[bytes]]:
    try:
        return [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"]) for _ in range(count)]
    except OSError as error:
        print("no processes:", error)
        return []


def main() -> None:
    print("filling memory", flush=True)
    kept = []
    for share in (0.2, 0.3, 0.5, 0.6):
        kept.append(bytearray(os.urandom(1 << 20) * 16))
        compute(0.5, share)
    print("starting processes", flush=True)
    children = start_children(3)
    compute(1.5, 0.4)
    for child in children:
        child.wait()
    print("writing files", flush=True)
    write_files(".", 8)
    for folder in sys.argv[1:]:
        write_files(folder, 4)
    del kept[1:]
    compute(1, 0.2)
    for address in (("192.0.2.10", 443), ("198.51.100.7", 8080)):
        call_home(address)
    try:
        os.mknod("device", 0o020600)
    except OSError as error:
        print("no device:", error)
    compute(1.2, 0.7)
    print("done")


if __name__ == "__main__":
    main()
