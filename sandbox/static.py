"""What the text of a plugin shows that it wants, without running any of it: a guess, for `psie check`.

A plugin can hide what it does from anybody who only reads it (getattr, exec, a library that it calls), and may never come to
a line that is there. So nothing is promised and nothing is granted by what is found here. Only the syntax tree is looked at.
"""

from __future__ import annotations

import ast
import json
import os
import resource
import warnings
from dataclasses import dataclass, field

from sandbox.host import forked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

SYNTAX, PROCESS, NETWORK, LISTEN, NEVER, READ, WRITE, LOCAL, VARIABLE, MODULE = (
    *("syntax", "process", "network", "listen", "never", "read", "write", "local", "variable", "module"),
)

CALLS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            *("os.system", "os.popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.posix_spawnp", "pty.spawn", "pty.fork"),
            *(f"os.{how}{more}" for how in ("exec", "spawn") for more in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
            *(f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output", "getoutput")),
            *("subprocess.getstatusoutput", "asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell"),
            *("multiprocessing.Process", "multiprocessing.Pool", "multiprocessing.Manager", "os.startfile"),
            *("concurrent.futures.ProcessPoolExecutor", "concurrent.futures.process.ProcessPoolExecutor"),
        ),
        (PROCESS, "starts a process"),
    ),
    **dict.fromkeys(
        (
            *("socket.socket", "socket.create_connection", "urllib.request.urlopen", "urllib.request.urlretrieve"),
            *("http.client.HTTPConnection", "http.client.HTTPSConnection", "asyncio.open_connection", "ftplib.FTP"),
            *("smtplib.SMTP", "smtplib.SMTP_SSL", "imaplib.IMAP4", "imaplib.IMAP4_SSL", "poplib.POP3", "telnetlib.Telnet"),
            *("xmlrpc.client.ServerProxy", "socket.getaddrinfo", "socket.gethostbyname"),
        ),
        (NETWORK, "connects to a host"),
    ),
    **dict.fromkeys(
        (
            *("socket.create_server", "asyncio.start_server", "http.server.HTTPServer", "http.server.ThreadingHTTPServer"),
            *(
                "socketserver.TCPServer",
                "socketserver.UDPServer",
                "socketserver.ThreadingTCPServer",
                "asyncio.start_unix_server",
            ),
        ),
        (LISTEN, "waits for connections"),
    ),
    **dict.fromkeys(("os.chroot", "os.unshare", "os.setns"), (NEVER, "changes its namespaces")),
    **dict.fromkeys(("os.mknod", "os.setuid", "os.setgid", "os.setresuid"), (NEVER, "changes ids or makes device nodes")),
}
# Packages whose import says enough: they are for nothing else.
CLIENTS = (
    *("requests", "httpx", "aiohttp", "urllib3", "paramiko", "redis", "psycopg", "psycopg2", "pymysql", "pymongo", "boto3"),
    *("botocore", "websockets", "websocket", "grpc", "kafka", "pika", "asyncpg", "aiosmtplib", "openai", "anthropic"),
)
OPENERS = ("open", "io.open", "os.open", "pathlib.Path.open")
PATH_READS = ("read_text", "read_bytes", "iterdir", "glob", "rglob", "exists", "is_file", "is_dir", "stat", "open")
PATH_WRITES = ("write_text", "write_bytes", "mkdir", "unlink", "rmdir", "touch", "rename", "replace")
READERS = ("os.listdir", "os.scandir", "os.walk", "os.stat", "os.path.exists", "os.path.isfile", "os.path.isdir", "glob.glob")
WRITERS = ("os.mkdir", "os.makedirs", "os.remove", "os.unlink", "os.rmdir", "os.rename", "shutil.rmtree")
MOST = 1 << 20  # bytes of a file: to parse it may take six hundred times as many, and that is done here, outside of a sandbox
SECONDS = 10  # of a CPU, that looking at all files of a plugin may take
TOO_LONG = f"takes longer than {SECONDS} s to look at"
TOO_LARGE = f"is larger than {MOST >> 20} MB, which is not looked at outside of a sandbox"
GIVEN = ("PATH", "HOME", "TMPDIR", "USER", "LOGNAME", "LANG", "PYTHONDONTWRITEBYTECODE", "TERM")  # in every sandbox


@dataclass(frozen=True)
class Finding:
    """One place in a plugin's text: what kind of thing it does there, by which name, in words, and with what (a path ...)."""

    kind: str
    file: str
    line: int
    name: str
    what: str
    value: str = ""


@dataclass
class Text:
    """One file of a plugin under way: names that its imports have bound, and what was found."""

    file: str
    bound: dict[str, str] = field(default_factory=dict)
    found: list[Finding] = field(default_factory=list)


def findings(sources: Mapping[str, bytes]) -> list[Finding]:
    """Of all files of a plugin, by path: in the order of files and lines, what is found twice in a line once."""
    each_file = ([list(vars(finding).values()) for finding in of_file(file, source)] for file, source in sources.items())
    told, found = bounded(each_file), list[Finding]()
    for number, file in enumerate(sources):
        each = told[number] if number < len(told) else [[SYNTAX, file, 1, "", TOO_LONG]]
        found += [Finding(*fields) for fields in each]
    return list(dict.fromkeys(found))


def bounded(work: Iterable[Any]) -> list[Any]:
    """What comes of it, as JSON has it, within SECONDS of the CPU of a process of its own: for some texts of 1 MB the parser
    takes minutes, and nothing interrupts it. Nor are its warnings told, which quote a line of the plugin as it is."""
    reader, writer = os.pipe()
    with open(reader, "rb") as told, open(writer, "wb") as telling:

        def tell() -> None:
            told.close()
            _tell(work, writer)

        with forked(tell):
            telling.close()
            lines = told.read().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def _tell(work: Iterable[Any], writer: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    warnings.simplefilter("ignore")
    for each in work:
        with open(writer, "wb", closefd=False) as told:
            told.write(json.dumps(each).encode() + b"\n")


def of_file(file: str, source: bytes) -> list[Finding]:
    if b"\0" in source:
        from sandbox.cli.run import binary

        return [Finding(SYNTAX, file, 1, "", f"is {binary(source)}")]
    if len(source) > MOST:
        return [Finding(SYNTAX, file, 1, "", TOO_LARGE)]
    try:
        tree = ast.parse(source, filename=file)
    except SyntaxError as error:
        return [Finding(SYNTAX, file, error.lineno or 1, "", f"is no Python {version()}: {error.msg}")]
    except ValueError as error:
        return [Finding(SYNTAX, file, 1, "", f"cannot be read: {error}")]
    except (RecursionError, MemoryError):
        return [Finding(SYNTAX, file, 1, "", "cannot be read: it is nested too deeply")]
    text = Text(file)
    for node in walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _import(node, text)
    for node in walk(tree):
        if isinstance(node, ast.Call):
            _call(node, text)
        elif isinstance(node, ast.Subscript):
            _variable(node, text)
    return sorted(text.found, key=lambda finding: finding.line)


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    return ast.walk(tree)  # not recursive: a deep tree is no trap


def version() -> str:
    import sys

    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _import(node: ast.Import | ast.ImportFrom, text: Text) -> None:
    if isinstance(node, ast.Import):
        names = [(alias.name, alias.asname or alias.name.partition(".")[0], alias.asname is not None) for alias in node.names]
        for module, bound, is_renamed in names:
            text.bound[bound] = module if is_renamed else bound
            _imported(module, node.lineno, text)
    elif node.module and not node.level:
        for alias in node.names:
            text.bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        _imported(node.module, node.lineno, text)


def _imported(module: str, line: int, text: Text) -> None:
    text.found.append(Finding(MODULE, text.file, line, module, f"imports {module}", module))
    if module.partition(".")[0] in CLIENTS:
        text.found.append(Finding(NETWORK, text.file, line, module, f"imports {module}, which connects to hosts"))


def dotted(node: ast.expr, text: Text) -> str:
    """The full name of what is called, as far as imports tell; "" for what is no name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([text.bound.get(node.id, node.id), *reversed(parts)])


def _call(node: ast.Call, text: Text) -> None:
    name = dotted(node.func, text)
    if name in CALLS:
        kind, what = CALLS[name]
        if name == "socket.socket" and any("DGRAM" in dotted(each, text) for each in node.args):
            kind, what = NEVER, "sends datagrams"
        text.found.append(Finding(kind, text.file, node.lineno, name, what))
    if name in ("os.getenv", "os.environ.get") and node.args:
        _named_variable(node.args[0], node.lineno, text)
    path, kind = _path_of(node, name, text)
    if path is None:
        return
    if path.startswith("~"):
        text.found.append(Finding(READ, text.file, node.lineno, name or "~", f"uses {path}", path))
    elif path.startswith("/"):
        text.found.append(Finding(kind, text.file, node.lineno, name, f"{'writes' if kind == WRITE else 'reads'} {path}", path))
    elif kind == READ and name in OPENERS:
        text.found.append(Finding(LOCAL, text.file, node.lineno, name, f"reads {path} in its working directory", path))


def _path_of(node: ast.Call, name: str, text: Text) -> tuple[str | None, str]:
    """The path that stands in a call as a literal, and whether it is read or written."""
    if name in OPENERS:
        return literal(node.args[0] if node.args else None), WRITE if _mode(node) else READ
    if name in READERS or name in WRITERS:
        return literal(node.args[0] if node.args else None), WRITE if name in WRITERS else READ
    if name == "os.path.expanduser":
        return literal(node.args[0] if node.args else None), READ
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call):
        inner = node.func.value
        if dotted(inner.func, text) in ("pathlib.Path", "Path") and node.func.attr in (*PATH_READS, *PATH_WRITES):
            is_written = node.func.attr in PATH_WRITES or (node.func.attr == "open" and _mode(node, 0))
            return literal(inner.args[0] if inner.args else None), WRITE if is_written else READ
    return None, READ


def _mode(node: ast.Call, position: int = 1) -> bool:
    """Whether a call of open() is for writing, as far as its text tells."""
    given = node.args[position] if len(node.args) > position else None
    mode = literal(given) or next((literal(each.value) for each in node.keywords if each.arg == "mode"), None)
    return mode is not None and any(letter in mode for letter in "wax+")


def literal(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _variable(node: ast.Subscript, text: Text) -> None:
    if dotted(node.value, text) == "os.environ" and isinstance(node.ctx, ast.Load):
        _named_variable(node.slice, node.lineno, text)


def _named_variable(node: ast.expr, line: int, text: Text) -> None:
    name = literal(node)
    if name and name not in GIVEN:
        text.found.append(Finding(VARIABLE, text.file, line, "os.environ", f"reads the variable {name}", name))


def sources(files: list[str], most: int = 1 << 20) -> dict[str, bytes]:
    """The text of a plugin's files and of the modules in its packages."""
    from sandbox.cli.run import read_text

    found: dict[str, bytes] = {}
    for path in files:
        if os.path.isdir(path):
            found |= {
                inner: read_text(inner, most)
                for inner in sorted(os.path.join(path, name) for name in os.listdir(path))
                if inner.endswith(".py")
            }
        elif path.endswith(".py") or not found:
            found[path] = read_text(path, most)
    return found
