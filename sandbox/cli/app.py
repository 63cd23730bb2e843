"""The click side of `psie`: help, mistakes, and every command but the fast path of `psie run`."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli import options
from sandbox.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FAILED = 125
LONGEST = 200  # characters of arguments that are too many, which may be a whole document
WHOLE = 1000  # characters of a command's first sentence: no limit


def with_options(table: Sequence[tuple[str, str, str, str]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command the options of a table."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, kind, placeholder, text in reversed(table):
            names = [name, *(short for short, long in options.SHORT.items() if long == name)]
            if kind == options.FLAG:
                function = click.option(*names, is_flag=True, help=text)(function)
            else:
                function = click.option(*names, metavar=placeholder, multiple=kind == options.MANY, help=text)(function)
        return function

    return decorate


class Group(click.Group):
    """A group whose help shows the first sentence of each command whole, and that knows `help`."""

    group_class = type  # of groups within it: this class

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, self.commands[name].get_short_help_str(WHOLE)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] == "help" and "help" not in self.commands:
            args = [*args[1:], "--help"]  # psie help run: psie run --help
            if len(args) == 1:
                click.echo(ctx.get_help())
                ctx.exit()
        if args[0] not in self.commands and os.path.isfile(args[0]):
            ctx.fail(f"no such command {args[0]!r}: to run this file, psie run {shlex.quote(args[0])}")
        return super().resolve_command(ctx, args)


def mistake(error: click.ClickException, arguments: Sequence[str]) -> str:
    """What click has found wrong, in one sentence, and whose help tells more."""
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        text = f"{error.message.rstrip('.')}: did you mean {error.possibilities[0]!r}"  # the nearest is the first of them
    else:
        text = " ".join(error.format_message().split()).rstrip(".").replace(". Choose", ": choose")
        text = text.replace(". Did you mean", ": did you mean").removesuffix("?")
        if text.startswith("Got unexpected extra argument"):
            text = f"{text[:LONGEST]}..." if len(text) > LONGEST else text
            text += f": leave {'them' if text.startswith('Got unexpected extra arguments') else 'it'} out"
    if isinstance(error, click.NoSuchOption) and is_behind_a_file(error.option_name, arguments):
        text += "; options of the plugin's own come behind --"
    return f"{text[:1].lower()}{text[1:]}; see {command_of(arguments)} --help"


def is_behind_a_file(option: str, arguments: Sequence[str]) -> bool:
    """Whether it may be meant for the plugin: of a command that takes arguments for one, and behind its file."""
    if command_of(arguments) not in ("psie run", "psie check", "psie learn", "psie spec"):
        return False
    place = next((number for number, word in enumerate(arguments) if word.startswith(option)), 0)
    return any(os.path.isfile(word) for word in arguments[:place])


def command_of(arguments: Sequence[str]) -> str:
    """The command that was meant, as far as the words name one: "psie plugins run"."""
    words = ["psie"]
    command: click.Command = group
    for word in arguments:
        inner = command.commands.get(word) if isinstance(command, click.Group) else None
        if inner is None:
            break
        words, command = [*words, word], inner
    return " ".join(words)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="psie", message="%(prog)s %(version)s")
def group() -> None:
    """Run Python code that nobody has to trust, in a sandbox of namespaces, cgroup v2, seccomp and Landlock."""


@group.command()
@with_options(options.RUN)
@click.argument("file")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(**given: Any) -> None:
    """Run FILE as `python FILE ARGS` would, in a sandbox.

    Options among ARGS come behind --: psie run FILE -- --verbose.

    The exit status is the plugin's own; 124 timed out; 125 psie failed, the command line is wrong or FILE is quarantined;
    126 a security violation ended it; 137 out of memory; 128+n killed by signal n.
    """
    from sandbox.cli import run as command

    sys.exit(command.run(given))


@group.command()
@with_options(options.CALL)
@click.argument("target", metavar="FILE:FUNCTION")
def call(**given: Any) -> None:
    """Call FUNCTION of FILE in a sandbox and print what it returns as JSON.

    What the plugin prints goes to stderr, so that stdout holds the reply alone.
    """
    from sandbox.cli import call as command

    sys.exit(command.call(given))


@group.command()
@click.option("--level", metavar="LEVEL", help="Of which the exit status tells (default: standard, as of psie run).")
@click.option("--config", metavar="FILE.toml", help="Settings: tables [isolation], [limits], [permissions].")
@click.option("--run", is_flag=True, help="Run it at each level, and tell what was refused; nothing that it changes is kept.")
@click.option("--env", metavar="NAME[=VALUE]", multiple=True, help="An environment variable of each run. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.argument("file")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def check(**given: Any) -> None:
    """Tell what each level would refuse FILE: guessed from its text alone, or with --run seen in a run at each level.

    The exit status is 0 if nothing is found that the level refuses (with --run: and it ended there with status 0), else 1.
    """
    from sandbox.cli import check as command

    sys.exit(command.check(given))


@group.command()
@click.option("--level", metavar="LEVEL", help="standard, strict (default) or maximum.")
@click.option("--output", metavar="FILE", help="Where to write it (default: psie.toml beside the plugin; - is stdout).")
@click.option("--dry-run", is_flag=True, help="Write to stdout, and no file.")
@click.option("--force", is_flag=True, help="Replace a file that is there already.")
@click.option(
    "--allow-file", metavar="PATH", multiple=True, help="It may use this, and what is below, while learning. Repeatable."
)
@click.option("--allow-files", is_flag=True, help="It may use all that it asks for and you may, but for known secrets.")
@click.option("--allow-host", metavar="HOST[:PORT]", multiple=True, help="It may connect there while learning. Repeatable.")
@click.option("--allow-network", is_flag=True, help="It may connect to every public host that it asks for.")
@click.option("--no-subprocess", is_flag=True, help="It may not start programs.")
@click.option("--no-input", is_flag=True, help="Do not ask on the terminal about what no option allows; refuse it.")
@click.option("--memory", metavar="SIZE", help="The most memory of a run, as 512M or 2G (default: 1G).")
@click.option("--timeout", metavar="SECONDS", help="The longest that a run may take (default: 60).")
@click.option("--status", metavar="N", type=int, default=0, help="The exit status that is a good end (default: 0).")
@click.option("--env", metavar="NAME[=VALUE]", multiple=True, help="An environment variable of each run. Repeatable.")
@click.option("--keep-all", is_flag=True, help="Do not try which of the grants it can do without.")
@click.argument("file")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def learn(**given: Any) -> None:
    """Run FILE until it has what it needs, and write that down as a psie.toml.

    It is run several times, in a sandbox of the level, never with more than it has asked for and you allow: paths among its
    ARGS and what the --allow options say. What it changes is not kept. The exit status is 0 if it was written, and a last run
    under it has ended well; 1 if FILE does not work with what may be granted: then nothing is written.
    """
    from sandbox.cli import learn as command

    sys.exit(command.learn(given))


@group.command()
@click.option("--level", metavar="LEVEL", help="minimal, standard, strict or maximum; all if left out.")
@click.option("--config", metavar="FILE.toml", help="Settings: tables [isolation], [limits], [permissions].")
@click.option("--sources", is_flag=True, help="Show every setting instead, and where it comes from.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.argument("file", required=False)
def explain(**given: Any) -> None:
    """Show each protection of a level, its mechanism, and what this host makes of it.

    With FILE it is for a run of that plugin, with the settings beside it.
    """
    from sandbox.cli import explain as command

    sys.exit(command.explain(**given))


@group.command()
@click.option("--json", "as_json", is_flag=True, help="What was found, as JSON.")
@click.option("--fix", is_flag=True, help="Show each change that is safe to make, ask, make it, and look again.")
@click.option("--yes", is_flag=True, help="With --fix: do not ask.")
def doctor(**given: Any) -> None:
    """Say what this host can do per level, and for each thing that is missing the cause and the commands that mend it.

    Sandboxes are really opened; by root also as an unprivileged user. The exit status is 1 if a level is not as promised here.
    """
    from sandbox.cli import doctor as command

    sys.exit(command.run(**given))


@group.command()
@click.option("--level", metavar="LEVEL", help="minimal, standard, strict or maximum; all if left out.")
@click.option("--config", metavar="FILE.toml", help="Settings: tables [isolation], [limits], [permissions].")
@click.option("--json", "as_json", is_flag=True, help="The ratings as JSON.")
def score(**given: Any) -> None:
    """Rate how exposed each level leaves this host, from 0 to 10, and say what would change that most."""
    from sandbox.cli import score as command

    sys.exit(command.rate(**given))


@group.command()
@click.option("--level", metavar="LEVEL", help="minimal, standard, strict (default) or maximum.")
@click.option("--json", "as_json", is_flag=True, help="The results as JSON.")
@click.argument("names", metavar="[ATTACK]...", nargs=-1)
def selftest(**given: Any) -> None:
    """Try to break out of sandboxes on this host, by every attack that is safe to try here, and say what came of each.

    Or by some of these attacks, named. Each is tried outside a sandbox first. The exit status is 1 if one was not stopped.
    """
    from sandbox.cli import selftest as command

    sys.exit(command.run(**given))


@group.command()
@click.option("--level", metavar="LEVEL", help="standard, strict or maximum (default: standard).")
@click.option("--config", metavar="FILE.toml", help="Settings: tables [isolation], [limits], [permissions].")
@click.option("--bundle", metavar="DIR", help="Make a bundle in the new folder DIR, for `crun run -b DIR NAME`.")
@click.argument("file", metavar="[FILE]", required=False)
@click.argument("args", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
def spec(**given: Any) -> None:
    """Print a level as the config.json of an OCI runtime (crun, runc, youki), which runs FILE.

    What such a runtime cannot do is said on stderr, and in the document's annotations.
    """
    from sandbox.cli import spec as command

    sys.exit(command.spec(**given))


@group.command()
def levels() -> None:
    """Print the table of levels: what each one promises where the host can do everything."""
    from sandbox.cli import explain as command

    sys.exit(command.levels())


@group.command()
@click.option("--list", "as_list", is_flag=True, help="Show what was accepted, and whether it is still as it was.")
@click.option("--forget", is_flag=True, help="FILE counts no more.")
@click.argument("files", nargs=-1, metavar="[FILE]...")
def trust(**given: Any) -> None:
    """Accept FILE, a psie.toml or pyproject.toml beside a plugin, as your settings for what lies there.

    Read it first: it may allow more than the defaults. It counts as it is now; one that is changed has to be accepted again.
    """
    from sandbox.cli import trust as command

    sys.exit(command.trust(**given))


@group.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete psie's commands, options and arguments.

    For bash: psie completion bash >~/.local/share/bash-completion/completions/psie
    """
    from sandbox.cli import completion as command

    sys.exit(command.script(shell))


@group.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def ps(**given: Any) -> None:
    """List the sandboxes that run now, of whichever process of this user; for root those of all users."""
    from sandbox.cli import running as command

    sys.exit(command.listed(**given))


@group.command()
@click.option("-n", "seconds", metavar="SECONDS", type=float, default=2.0, help="Between two looks (default: 2).")
@click.option("--once", is_flag=True, help="Print one table, and end.")
def top(**given: Any) -> None:
    """Show what the sandboxes that run use, again and again until q or Ctrl-C.

    Where stdout is no terminal, or one that cannot move its cursor (TERM=dumb), one table is printed.
    """
    from sandbox.cli import running as command

    sys.exit(command.top(**given))


@group.command()
@click.option("--all", "is_all", is_flag=True, help="All that psie ps shows of this user.")
@click.argument("ids", metavar="[ID]...", nargs=-1)
def kill(**given: Any) -> None:
    """End sandboxes by their ids, or by what an id begins with, whoever's process has opened them.

    Their callers see that a person has killed them, and psie history says so.
    """
    from sandbox.cli import running as command

    sys.exit(command.kill(**given))


@group.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON, with the whole recipe.")
@click.argument("name", metavar="ID")
def inspect(**given: Any) -> None:
    """Show what a sandbox was made by, and each of its protections as the kernel tells it now.

    The exit status is 1 if one is not as the recipe says.
    """
    from sandbox.cli import running as command

    sys.exit(command.inspect(**given))


@group.command()
def gc() -> None:
    """Remove what is left of sandboxes that were killed together with all that would have cleaned up."""
    from sandbox.cli import leftovers as command

    sys.exit(command.remove())


@group.group()
def plugins() -> None:
    """Look at, sign, check and run the plugins in a plugin folder. Only `run` runs anything of them."""


@plugins.command("list")
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="The list as JSON.")
def list_plugins(**given: Any) -> None:
    """List the plugins in DIR, the broken ones with what is wrong."""
    from sandbox.cli import plugins as command

    sys.exit(command.listed(**given))


@plugins.command("check")
@click.argument("folder", metavar="DIR")
@click.argument("plugin_id", metavar="[ID]", required=False)
@click.option("--trusted-keys", metavar="FOLDER", help="NAME.pub files (default: trusted-keys in psie's state folder).")
def check_plugins(**given: Any) -> None:
    """Check files, manifest, digests, signature and syntax of one plugin in DIR, or of all.

    The exit status is 1 if something is wrong. That a plugin is not signed is wrong only where its manifest wants it to be.
    """
    from sandbox.cli import plugins as command

    sys.exit(command.check(**given))


@plugins.command("sign")
@click.argument("folder", metavar="DIR")
@click.argument("plugin_id", metavar="ID")
@click.option("--key", metavar="FILE", required=True, help="The private key, as psie plugins keygen makes it.")
def sign_plugin(**given: Any) -> None:
    """Sign a plugin as it is now: every file of it, its manifest and its id."""
    from sandbox.cli import plugins as command

    sys.exit(command.sign(**given))


@plugins.command("run")
@click.argument("folder", metavar="DIR")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--level", metavar="LEVEL", help="minimal, standard, strict or maximum (default: standard).")
@click.option("--config", metavar="FILE.toml", help="The most that plugins get: tables [isolation], [limits], [permissions].")
@click.option("--json", "as_json", is_flag=True, help="What load_plugin_enhanced returns for each, as JSON.")
@click.option("--trusted-keys", metavar="FOLDER", help="NAME.pub files (default: trusted-keys in psie's state folder).")
def run_plugins(**given: Any) -> None:
    """Run plugins in DIR, or all of them, each in a sandbox of its own, and tell what became of each.

    What they print goes to stderr. The exit status is 0 if all have succeeded, else 1.
    """
    from sandbox.cli import loads as command

    sys.exit(command.run(**given))


@plugins.command("keygen")
@click.argument("file")
def make_key(file: str) -> None:
    """Make a private key in FILE, and print the public one: its place is NAME.pub in the folder of trusted keys."""
    from sandbox.cli import plugins as command

    sys.exit(command.keygen(file))


@group.command()
@click.option("--plugin", metavar="ID", help="Of this plugin alone.")
@click.option("--level", metavar="LEVEL", help="minimal, standard, strict or maximum.")
@click.option("--outcome", metavar="OUTCOME", help="ok, error, limit, violation or refused.")
@click.option("--since", metavar="WHEN", help="An age, as 24h or 7d, or a time, as 2026-01-31T12:00.")
@click.option("--limit", metavar="N", type=int, default=100, help="At most so many (default: 100).")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all that is known.")
def history(**given: Any) -> None:
    """Show the runs that are remembered, newest first."""
    from sandbox.cli import history as command

    sys.exit(command.history(**given))


@group.group()
def quarantine() -> None:
    """Show, release and export quarantined plugins."""


@quarantine.command("list")
@click.option("--all", "include_released", is_flag=True, help="Also those that were released.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all that is known.")
def quarantine_list(**given: Any) -> None:
    """Show which plugins are quarantined, and why."""
    from sandbox.cli import quarantine as command

    sys.exit(command.listed(**given))


@quarantine.command("show")
@click.argument("plugin_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def quarantine_show(**given: Any) -> None:
    """Show what is known of the plugin ID and its newest quarantine."""
    from sandbox.cli import quarantine as command

    sys.exit(command.show(**given))


@quarantine.command("release")
@click.argument("plugin_id", metavar="ID")
def quarantine_release(**given: Any) -> None:
    """Release the plugin ID. The audit keeps who did. The exit status is 1 if it is not quarantined."""
    from sandbox.cli import quarantine as command

    sys.exit(command.release(**given))


@quarantine.command("export")
@click.argument("plugin_id", metavar="ID")
@click.argument("target", metavar="DIR")
def quarantine_export(**given: Any) -> None:
    """Copy the evidence against the plugin ID to the new folder DIR."""
    from sandbox.cli import quarantine as command

    sys.exit(command.export(**given))


@group.group()
def audit() -> None:
    """Check the record of what was decided."""


@audit.command("verify")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def audit_verify(**given: Any) -> None:
    """Check that no line of the audit was changed, taken out or cut off. The exit status is 1 if one was."""
    from sandbox.cli import audit as command

    sys.exit(command.verify(**given))


def main(arguments: Sequence[str]) -> int:
    """Run the group; a mistake on the command line is one sentence and status 125."""
    if "_PSIE_COMPLETE" in os.environ:  # a shell asks
        from sandbox.cli import completion

        completion.prepare(group)
    try:
        result = group.main(list(arguments), prog_name="psie", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            click.echo(error.format_message())
            return 0
        click.echo(f"psie: {mistake(error, arguments)}", err=True)
        return FAILED
    return result if isinstance(result, int) else 0
