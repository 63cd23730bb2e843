"""Code that a language model has written: text in; its value, what it has printed, or an explained refusal out.

The refusal is fed back, so that the model can mend its code. No model is needed here: a list of snippets stands for one.

    python examples/code_runner.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sandbox import (
    EnhancedPluginSandbox,
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    PluginPermissionsV2,
    SandboxException,
)
from sandbox.text import escape_text

LIMITS = PluginLimitsV2(max_memory_mb=256, max_execution_time_seconds=2, max_thread_count=16)
# numpy is imported once, in the process from which each snippet's is forked.
CONFIG = IsolationConfig(level=IsolationLevel.STRICT, preload=("numpy",))


@dataclass(frozen=True)
class Outcome:
    """`refusal` is "" where the code has run to its end; then `value` is that of its last expression."""

    value: Any = None
    printed: str = ""
    refusal: str = ""


def execute(code: str) -> Any:
    """Inside the sandbox: run the text; the value of its last expression, None if it does not end with one."""
    import ast

    import numpy

    tree = ast.parse(code, "snippet")
    names: dict[str, Any] = {"__name__": "__main__", "np": numpy}
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "snippet", "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), "snippet", "eval"), names)


async def run_code(code: str) -> Outcome:
    """Run a text in a sandbox of its own. Raises SandboxInitializationError where none can be had."""
    async with EnhancedPluginSandbox(LIMITS, PluginPermissionsV2(), CONFIG) as sandbox:
        try:
            value, refusal = await sandbox.execute_plugin_safe(execute, code), ""
        except SandboxException as error:
            if not sandbox.protections:
                raise
            value, refusal = None, str(error)
            # Also what the code itself has caught may be why it did not come to its end.
            reasons = dict.fromkeys(each.explanation.reason for each in sandbox.get_violations() if each.explanation)
            refusal = "\n".join([refusal, *(reason for reason in reasons if reason not in refusal)])
    # Now all of it has been read: the value may come before the last of what was printed.
    return Outcome(value, escape_text(sandbox.output_tail.decode("utf-8", "replace")), refusal)


async def solve(task: str, model: Callable[[str], str], attempts: int = 3) -> Outcome:
    """Ask the model for code until some has run, at most so often."""
    prompt = task
    for _ in range(attempts):
        outcome = await run_code(model(prompt))
        if not outcome.refusal:
            return outcome
        prompt = f"{task}\nYour code did not run:\n{outcome.refusal}\nMend it."
    return outcome


SNIPPETS = {
    "a mean": ["data = np.arange(10)\nprint('the mean of', data)\nfloat(data.mean())"],
    "a slip, mended": ["nump.arange(3).sum()", "int(np.arange(3).sum())"],
    "your password": ["open('/etc/shadow').read()", "import socket\nsocket.create_connection(('192.0.2.1', 80))", "'given up'"],
    "all of the memory": ["len(np.ones(2**30))", "len(np.ones(2**20))"],
    "for ever": ["while True: pass", "1 + 1"],
}


async def main() -> None:
    for task, snippets in SNIPPETS.items():
        canned = iter(snippets)

        def model(prompt: str, canned: Any = canned) -> str:
            code: str = next(canned)
            print(f"  model is asked: {prompt!r}"[:300])
            return code

        print(f"{task}:")
        outcome = await solve(task, model)
        print(f"  value {outcome.value!r}, printed {outcome.printed!r}, refusal {outcome.refusal!r}")


if __name__ == "__main__":
    asyncio.run(main())
