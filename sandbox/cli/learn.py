"""`psie learn FILE`: run a plugin until it has what it needs, as far as the person allows that, and write that down.

It is never run with more than it has asked for and been granted: each run is at the level that is wanted, the next one has what
the last was refused. See sandbox.learn for what may be granted, and sandbox.cli.trial for the runs, of which nothing is kept.
"""

from __future__ import annotations

import os
import shlex
import sys
from time import monotonic

from sandbox import learn as learning
from sandbox import trusted
from sandbox.cli import beside, settings, trial, written
from sandbox.cli import run as run_command
from sandbox.cli.inputs import UsageError
from sandbox.cli.remembered import Remembered
from sandbox.cli.session import guarded, say
from sandbox.cli.target import NO_PLACES
from sandbox.config import PluginLimitsV2
from sandbox.learn import HOST, PROCESS, Consent, Peaks, Policy
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from sandbox.cli.trial import Result

ROUNDS = 12  # runs in which something new was learned
MEMORY_MB, SECONDS = 1024.0, 60.0
LESS_SECONDS = 120.0  # in all, for trying with less
PROOFS = 8
TAIL_LINES = 10
LINES = 20  # of one kind that are said


def learn(given: dict[str, Any]) -> int:
    """0: written and proved; 1: the plugin did not do its work with what may be granted, and nothing is written; 125."""
    return guarded(lambda: Learning(given).run())


class Learning:
    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.runner = trial.Runner(given["file"], given["args"], given["env"])
        path = self.runner.path
        self.output = output_of(given, path)
        level = settings.level(given["level"] or "strict").value
        if level == "minimal":
            raise UsageError("--level minimal: there folders are written directly, so learning could not undo it: give another")
        ceilings = {"max_memory_mb": MEMORY_MB, "max_execution_time_seconds": SECONDS}
        if given["memory"] is not None:
            ceilings["max_memory_mb"] = settings.megabytes(given["memory"])
        if given["timeout"] is not None:
            ceilings["max_execution_time_seconds"] = settings.number("--timeout", given["timeout"])
        settings.bounded(PluginLimitsV2(), ceilings)
        if not 0 <= given["status"] <= 255:
            raise UsageError(f"--status {given['status']}: give an exit status, from 0 to 255")
        self.digest = ""  # of its output and changes, if they are the same each time
        self.policy = Policy(level, path, ceilings)
        self.consent = Consent(
            named=[*named_in(given["args"]), *files_of(given["allow_file"])],
            files=given["allow_files"],
            hosts=[settings.host(text) for text in given["allow_host"]],
            network=given["allow_network"],
            processes=not given["no_subprocess"],
            ask=Questions() if os.isatty(0) and os.isatty(2) and not given["no_input"] else None,
        )
        self.peaks = Peaks()
        self.is_guess = False  # limits were raised without a word of the run's which of them was too low
        self.hints: dict[str, None] = {}
        self.impossible: dict[str, None] = {}
        files = run_command.siblings(path, self.runner.source)
        Remembered(given, path, path, self.runner.source, files[1:], say).refuse_quarantined()
        self.runner.stdin = trial.standard_input()

    def run(self) -> int:
        name = os.path.basename(self.runner.path)
        say(f"{name} is run at level {self.policy.level}, several times; nothing that it changes is kept")
        result = self.rounds()
        if not self.is_good(result):
            return self.give_up(result)
        unsure = self.less(result)
        text, proof = self.proof(unsure)
        if not self.is_proof(proof):
            return self.give_up(proof)
        self.tell(unsure)
        return self.write(text, proof)

    # -- runs ------------------------------------------------------------------------------------------------------------

    def once(self, toml: str) -> Result:
        result = self.runner.run(toml)
        if result.failed:
            raise run_command.Failed(result.failed)
        self.peaks.add(result)
        return result

    def rounds(self) -> Result:
        """Run until a run tells of nothing new that may be granted."""
        for _ in range(ROUNDS):
            result = self.once(self.policy.learning())
            seen = learning.seen_in(result, os.getcwd())
            self.hints |= dict.fromkeys(seen.hints)
            self.impossible |= dict.fromkeys(seen.impossible)
            if not self.policy.take(seen, self.consent):
                break
        return result

    def is_good(self, result: Result) -> bool:
        """Whether it did its work. What it changed must also be kept: psie run keeps nothing where something was refused."""
        unkept = result.unkept if self.given["status"] == 0 else ""
        return not result.reason and not unkept and result.status == self.given["status"]

    def less(self, full: Result) -> str:
        """Leave out each grant without which the plugin does the same. What is to be said if that could not be tried."""
        if self.given["keep_all"] or not self.policy.grants:
            return ""
        begun = monotonic()
        again = self.once(self.policy.learning())
        if not self.is_good(again) or again.digest != full.digest:
            return "Its output is another each time, so that nothing could be left out by trying."
        self.digest = full.digest
        for key in list(self.policy.grants):
            if monotonic() - begun + full.seconds > LESS_SECONDS:
                return "Not all of it was tried without: that takes too long."
            fewer = self.policy.without(key)
            if self.does_the_same(fewer, full):
                self.policy = fewer
        if self.policy.values(PROCESS):
            self.fewer_processes(full)
        return ""

    def fewer_processes(self, full: Result) -> None:
        wanted = self.policy.subprocesses
        for number in learning.FEWER:
            if number < wanted:
                self.policy.subprocesses = number
                if self.does_the_same(self.policy, full):
                    return
        self.policy.subprocesses = wanted

    def does_the_same(self, policy: Policy, full: Result) -> bool:
        result = self.once(policy.learning())
        return self.is_good(result) and result.digest == full.digest

    def proof(self, unsure: str) -> tuple[str, Result]:
        """The text of the file, and a run under it. It differs from those before by its limits alone: where it fails, they are
        too low all the same, and are raised; those that were raised on a guess are lowered again where that works."""
        limits = learning.limits_for(self.policy, self.peaks)
        measured = dict(limits)
        for _ in range(PROOFS):
            text, proof = self.under(limits, unsure)
            if self.is_proof(proof) or not self.raise_limits(limits, proof):
                break
        for name in [name for name in limits if self.is_guess and self.is_proof(proof) and limits[name] != measured[name]]:
            lower = {**limits, name: measured[name]}
            lower_text, lower_proof = self.under(lower, unsure)
            if self.is_proof(lower_proof):
                limits, text, proof = lower, lower_text, lower_proof
        return text, proof

    def under(self, limits: dict[str, tuple[float, str]], unsure: str) -> tuple[str, Result]:
        """The text of the file with these limits, and a run under it."""
        text = learning.render(self.policy, limits, self.runner.runs + 1, self.given["args"], unsure)
        proof = self.runner.run(text)
        if proof.failed:
            raise run_command.Failed(proof.failed)
        return text, proof

    def is_proof(self, result: Result) -> bool:
        return self.is_good(result) and self.digest in ("", result.digest)

    def raise_limits(self, limits: dict[str, tuple[float, str]], proof: Result) -> bool:
        """Those that have ended it; where none says so, or has room, memory (a kernel that counts address space in its place
        has more to count than what was measured), and at last all."""
        most = self.policy.learning_limits()
        passed = [wish.value for wish in learning.seen_in(proof, os.getcwd()).wishes if wish.kind == learning.LIMIT]
        for names in (passed, ["max_memory_mb"] if proof.limit else [], list(limits)):
            room = [name for name in names if name in limits and limits[name][0] < most.get(name, 0)]
            for name in room:
                limits[name] = (
                    min(2 * limits[name][0], most[name]),
                    "the peak with its headroom was not enough: doubled until it was",
                )
            if room:
                self.is_guess = self.is_guess or names is not passed
                return True
        return False

    # -- what is said ----------------------------------------------------------------------------------------------------

    def give_up(self, result: Result) -> int:
        for line in escape_text(result.tail).splitlines()[-TAIL_LINES:]:
            say(f"| {line}")
        ended = result.reason or (f"what it changed would not be kept: {result.unkept}" if result.unkept else "")
        ended = ended or f"it ended with status {result.status}"
        if self.is_good(result):
            ended = "under what was learned it did something else than before"
        say(f"nothing is written, because it did not work with what may be granted: {ended}")
        self.say_refused()
        if not result.reason and not self.policy.refused:
            say(f"if that is as it should be, --status {result.status} takes it for the good end")
        return 1

    def say_refused(self) -> None:
        told = [f"not granted: {what}: {why}" for what, why in self.policy.refused.items()]
        for lines in (told, list(self.impossible), list(self.hints)):
            for line in lines[:LINES]:
                say(line)
            if len(lines) > LINES:
                say(f"and {len(lines) - LINES} more of that kind")

    def tell(self, unsure: str) -> None:
        for grant in self.policy.ordered():
            say(f"it may {grant.title()} ({grant.reason(self.policy.plugin)})")
        if not self.policy.grants:
            say("it needs nothing beyond what every plugin has")
        for warning in self.policy.warnings():
            say(f"WARNING: {warning}")
        self.say_refused()
        if unsure:
            say(unsure[0].lower() + unsure[1:].rstrip("."))
        if self.policy.values(HOST):
            say("what it reached by network was reached in each of the runs")

    def write(self, text: str, proof: Result) -> int:
        worked = f"a run under it ended with status {proof.status}, as it should; it tells nothing of ways that it did not take"
        if self.output is None:
            status = written(lambda: sys.stdout.write(text) and 0)
            if not status:
                say(f"not written anywhere; {worked}")
            return status
        put(self.output, text, is_new=not self.given["force"])
        say(f"{self.output} is written; {worked}")
        environment = [word for entry in self.given["env"] for word in ("--env", entry)]  # which no file of settings has
        is_beside = self.output == os.path.join(os.path.dirname(self.runner.path), beside.OWN)
        if is_beside:  # the person has asked for it, and has been told of each grant
            trusted.accept(self.output, text.encode())
        named = [] if is_beside else ["--config", self.output]
        command = ["psie", "run", *named, *environment, self.given["file"], *self.given["args"]]
        say(f"to use it: {shlex.join(command)}")
        return 0


class Questions:
    """Asks the person, once for each thing."""

    def __init__(self) -> None:
        self.answers: dict[str, bool] = {}

    def __call__(self, what: str) -> bool:
        if what not in self.answers:
            import click

            self.answers[what] = click.confirm(f"psie: may it {escape_text(what, keep='')} from now on?", err=True)
        return self.answers[what]


def output_of(given: dict[str, Any], plugin: str) -> str | None:
    """Where the settings go; None: to stdout. Refuses before any run what could not be written after it."""
    if given["dry_run"] or given["output"] == "-":
        return None
    path = os.path.abspath(os.path.join(os.path.dirname(plugin), "psie.toml") if given["output"] is None else given["output"])
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        raise UsageError(f"--output {path}: this is a directory: give the file in it")
    if path.startswith(NO_PLACES) or (os.path.lexists(path) and not os.path.islink(path) and not os.path.isfile(path)):
        raise UsageError(f"--output {path}: this is no file of yours: give another, or --dry-run for standard output")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: give --output FILE in a folder of yours, or --dry-run to see it")
    if os.path.lexists(path) and not given["force"]:
        raise UsageError(f"{path} is there already: --force replaces it, --output FILE writes another, --dry-run shows it")
    return path


def put(path: str, text: str, *, is_new: bool) -> None:
    """The whole file or none of it; with `is_new` never in the place of one that has come meanwhile."""
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            os.link(temporary, path)
        else:
            os.rename(temporary, path)
    except FileExistsError:
        raise run_command.Failed(f"{path} has come to be meanwhile: look at it, then --force replaces it") from None
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def named_in(arguments: Sequence[str]) -> list[str]:
    """Absolute paths among the plugin's arguments, also as --option=/path: the person has named them."""
    found = []
    for argument in arguments:
        text = argument.partition("=")[2] if argument.startswith("-") else argument
        if text.startswith("/") and not is_too_much(os.path.realpath(text)):
            found.append(os.path.realpath(text))
    return found


def is_too_much(path: str) -> bool:
    """Whether all below it is more than a person can have meant."""
    return path in ("/", "/home", *learning.homes())


def files_of(paths: Sequence[str]) -> list[str]:
    for path in paths:
        if not os.path.lexists(path):
            raise UsageError(f"--allow-file {path}: there is no such file or folder: check the path")
        if is_too_much(os.path.realpath(path)):
            raise UsageError(f"--allow-file {path}: that is more than a plugin should have: name a folder in it")
    return [os.path.realpath(path) for path in paths]
