"""The smallest plugin: it says where it runs and what it sees."""

import os
import sys

print("hello from", sys.argv[0].rsplit("/", 1)[-1], "with arguments", sys.argv[1:])
print("uid", os.getuid(), "pid", os.getpid(), "in", os.getcwd())
