"""The page of --report: one file without a script, which loads nothing and which nothing that a plugin says can change.

Made from the data of --result-file alone. Every text goes through sandbox.cli.markup, which escapes it, and a Content Security
Policy forbids what is not in the page's own style sheet (https://www.w3.org/TR/CSP3/). Must not measure or look up anything.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime

from sandbox.cli import charts
from sandbox.cli.markup import Markup, joined, tag
from sandbox.cli.style import CSS
from sandbox.cli.words import counted, duration, number, size
from sandbox.recipe_data import ENFORCED, MISSING, SUBSTITUTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    Result = Mapping[str, Any]

ROWS = 200  # of a table that are shown: a plugin may cause any number
OUTCOMES = {
    "ok": "ended well",
    "error": "failed",
    "limit": "stopped by a limit",
    "violation": "ended for a violation",
}
STATES = (ENFORCED, SUBSTITUTED, MISSING)
WARNED = {"memory": "memory_warning_threshold_mb", "CPU": "cpu_warning_threshold_percent"}


def page(result: Result) -> str:
    """The whole page."""
    policy = f"default-src 'none'; style-src '{digest(CSS)}'; base-uri 'none'; form-action 'none'"
    name = result["telemetry"]["plugin_id"] or result["plugin"]
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"psie: {name}"),
        tag("style", Markup(CSS)),
    )
    sections = (
        beginning(result, name),
        tiles(result),
        timeline(result),
        violations(result),
        recovery(result),
        changes(result),
        file_operations(result),
        network(result),
        processes(result),
        protections(result),
        limits(result),
    )
    foot = tag("footer", f"Made by psie {result['psie']} on Linux {result['kernel']}. Loads nothing, runs nothing.")
    body = tag("main", *sections, foot)
    return f"<!DOCTYPE html>\n{tag('html', tag('head', *head), tag('body', body), lang='en')}\n"


def digest(style: str) -> str:
    """As a source of a policy: no other style sheet than this one."""
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


# -- the head ------------------------------------------------------------------------------------------------------------


def beginning(result: Result, name: str) -> Markup:
    outcome, telemetry = result["outcome"], result["telemetry"]
    badge = tag("span", OUTCOMES.get(outcome, outcome), class_=f"badge {'good' if outcome == 'ok' else 'bad'}")
    facts = {
        "Plugin": tag("code", result["plugin"]),
        "SHA-256": tag("code", result["sha256"]),
        "Level": result["level"],
        "Exit status": result["exit_code"],
        "Reason": tag("bdi", result["reason"]),
        "Started": moment(telemetry["start_time"]),
        "Ran for": duration(result["seconds"]),
        "Run by": "root" if result["uid"] == 0 else f"uid {result['uid']}",
        "Cleaned up": "yes, nothing is left" if telemetry["cleanup_successful"] else "no",
    }
    pairs = (tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items())
    return tag("header", tag("p", "psie report", class_="over"), tag("h1", tag("bdi", name), " ", badge), tag("dl", *pairs))


def tiles(result: Result) -> Markup:
    """The figures that matter, of their limits."""
    telemetry, allowed = result["telemetry"], result["limits"]
    samples = telemetry["resource_samples"]
    shown = [tile("Time", duration(result["seconds"]), duration(allowed["max_execution_time_seconds"]), share_of_time(result))]
    peak, most = telemetry["peak_memory_mb"], allowed["max_memory_mb"]
    if peak:  # else nobody has seen it
        shown.append(tile("Peak memory", f"{number(peak)} MB", f"{number(most)} MB", peak / most))
    if any(each["cpu_percent"] is not None for each in samples):
        cpu, most = telemetry["peak_cpu_percent"], allowed["max_cpu_percent"]
        shown.append(tile("Peak CPU", f"{number(cpu)} %", f"{number(most)} % of one CPU", cpu / most))
    tasks = max((each["threads"] or 0 for each in samples), default=0)
    if tasks:
        shown.append(tile("Processes and threads", number(tasks), number(result["max_tasks"]), tasks / result["max_tasks"]))
    used, most = telemetry["file_operations_count"], allowed["max_file_operations"]
    shown.append(tile("File operations", number(used), number(most), used / most if most else float(used > 0)))
    shown.append(tile("Network operations", number(telemetry["network_operations_count"])))
    return tag("section", *shown, class_="tiles", aria_label="Figures")


def share_of_time(result: Result) -> float:
    return float(result["seconds"] / result["limits"]["max_execution_time_seconds"])


def tile(name: str, used: str, most: str = "", share: float | None = None) -> Markup:
    of = tag("span", f"of {most}" if most else "", class_="of")
    bar = charts.meter(share, "full" if share >= 0.95 else "some") if share is not None else ""
    return tag("div", tag("span", name, class_="name"), tag("span", used, class_="used"), of, bar, class_="tile")


# -- over time -----------------------------------------------------------------------------------------------------------


def timeline(result: Result) -> Markup:
    samples, sampling = result["telemetry"]["resource_samples"], result["sampling"]
    if not samples:
        return section("Over time", tag("p", without_samples(result), class_="none"))
    began = sampling["began_seconds"] or 0.0
    end = max(result["seconds"], began + samples[-1]["elapsed_seconds"])
    allowed = result["limits"]

    def points(key: str) -> list[tuple[float, float | None]]:
        return [(began + each["elapsed_seconds"], each[key]) for each in samples]

    memory = charts.Series("used", "memory", points("memory_mb"))
    cpu = charts.Series("used since the sample before", "cpu", [(began, None), *points("cpu_percent")], charts.STEPS_BEFORE)
    tasks = [charts.Series("processes and threads", "tasks", points("threads"), charts.STEPS_AFTER)]
    if any(each["pids"] != each["threads"] for each in samples):
        tasks.append(charts.Series("processes", "pids", points("pids"), charts.STEPS_AFTER))
    figures = (
        charts.chart("Memory", "MB", [memory], levels(result, "memory", allowed["max_memory_mb"], " MB"), end),
        charts.chart("CPU", "% of one CPU", [cpu], levels(result, "CPU", allowed["max_cpu_percent"], " %"), end),
        charts.chart(
            "Processes and threads",
            "tasks",
            tasks,
            levels(result, "processes and threads", result["max_tasks"], ""),
            end,
            whole=True,
        ),
    )
    return section("Over time", *figures, tag("p", about_samples(result, end), class_="note"))


def levels(result: Result, name: str, limit: float, unit: str) -> list[charts.Level]:
    """The limit, with what stands for it on this host, and the warning threshold if there is one."""
    states = {each["name"]: each["state"] for each in result["protections"]}
    state = states.get(name, ENFORCED)
    weak = "" if state == ENFORCED else f" ({state})"
    found = [charts.Level(f"limit {number(limit)}{unit}{weak}", "limit", limit)]
    if name in WARNED:
        threshold = result["limits"][WARNED[name]]
        found.append(charts.Level(f"warning from {number(threshold)}{unit}", "warning", threshold))
    return found


def without_samples(result: Result) -> str:
    if not result["sampling"]["enabled"]:
        return "There are no samples: enable_real_time_monitoring is False."
    if result["seconds"] > result["sampling"]["interval_seconds"]:
        return "There are no samples: it could not be watched."
    return f"It ran for {duration(result['seconds'])}: too short for a sample of what it used over time."


def about_samples(result: Result, end: float) -> str:
    count = len(result["telemetry"]["resource_samples"])
    said = f"{counted(count, 'sample')}, one every {duration(result['sampling']['interval_seconds'])} and one at the end"
    if count > charts.MOST:
        said += "; of neighbouring ones only the lowest and the highest are drawn"
    peak = result["telemetry"]["peak_memory_mb"]
    most = f": the highest memory seen was {number(peak)} MB" if peak else ""
    return f"{said}. Between two samples it may have used more{most}."


# -- what happened -------------------------------------------------------------------------------------------------------


def violations(result: Result) -> Markup:
    found = result["violations"]
    if not found:
        return section("Violations", tag("p", "Nothing was refused, and no limit was passed.", class_="none"))
    return section(f"Violations ({len(found):,})", *map(violation, found[:ROWS]), *more(found))


def violation(record: Mapping[str, Any]) -> Markup:
    explanation = record["explanation"] or {}
    times = int(record["details"].get("count") or 1)
    labels = [
        tag("span", record["severity"], class_=f"badge {'bad' if record['severity'] == 'critical' else 'mild'}"),
        tag("span", str(record["type"]).replace("_", " "), class_="label"),
        tag("span", counted(times, "time"), class_="label") if times > 1 else "",
        tag("span", "recovered", class_="label") if record["resolved"] else "",
    ]
    said = [tag("p", tag("bdi", record["message"]), class_="message"), tag("p", *labels, class_="labels")]
    if explanation:
        said += explained(explanation)
    return tag("article", *said, class_="violation")


def explained(explanation: Mapping[str, Any]) -> list[Markup]:
    where = explanation["file"]
    if where and explanation["line"] is not None:
        where = f"{where}, line {explanation['line']}"
    facts: dict[str, object] = {
        "Protection": explanation["protection"],
        "Why": explanation["reason"] if explanation["refused"] else f"{explanation['reason']} (only a warning)",
        "Where": tag("code", where) if where else "",
    }
    if explanation["setting"] is None:
        facts["To allow it"] = "no setting and no level allows it"
    else:
        facts["To allow more" if ".max_" in explanation["setting"] else "To allow it"] = code(explanation["flag"])
        facts["in Python"] = code(explanation["python"] or explanation["setting"])
        facts["in a --config file"] = code(explanation["toml"])
    facts["Note"] = explanation["note"]
    return [tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items() if value))]


def code(source: str | None) -> Markup | str:
    """One line or several, as they are to be typed."""
    if not source:
        return ""
    return tag("code", joined(part for line in source.splitlines() for part in (line, Markup("<br>"))))


def recovery(result: Result) -> Markup:
    steps = result.get("recovery")
    if not steps:
        return Markup("")
    start = result["began"]
    rows = [
        (
            since(start, each["timestamp"]),
            each["action"],
            tag("bdi", facts_of(each["before"])) if each["before"] else "",
            tag("bdi", facts_of(each["after"])) if each["after"] else "",
            state("worked" if each["success"] else "failed", good=each["success"]),
            tag("bdi", each["note"]) if each["note"] else "",
        )
        for each in steps[:ROWS]
    ]
    return section("Recovery", table(("At", "Action", "Before", "After", "Outcome", "Note"), rows), *more(steps))


def changes(result: Result) -> Markup:
    found = result.get("changes")
    if found is None:
        return Markup("")
    kept = "They are in the folders now." if result["committed"] else "None was committed: the folders are as they were."
    if not found:
        return section("Changes in granted folders", tag("p", "Nothing was changed.", class_="none"))
    rows = [
        (
            each["kind"],
            tag("code", each["path"]),
            size(each["size"]) if each["size"] is not None else "",
            tag("code", each["sha256"]) if each["sha256"] else "",
            tag("bdi", each["problem"]) if each["problem"] else "",
        )
        for each in found[:ROWS]
    ]
    listed = table(("Change", "Path", "Size", "SHA-256", "Problem"), rows)
    return section(f"Changes in granted folders ({len(found):,})", tag("p", kept), listed, *more(found))


def file_operations(result: Result) -> Markup:
    found, count = result["file_operations"], result["telemetry"]["file_operations_count"]
    if not count:
        return section("File operations", tag("p", "None was seen. Reading is not counted.", class_="none"))
    start = result["began"]
    rows = [
        (
            since(start, each["timestamp"]),
            each["operation"],
            tag("code", each["path"], f" (from {each['from']})" if each.get("from") else ""),
            size(each["size"]) if each.get("size") is not None else "",
        )
        for each in found[:ROWS]
    ]
    return section(f"File operations ({count:,})", table(("At", "Operation", "Path", "Size"), rows), *more(found, count))


def network(result: Result) -> Markup:
    found, counters = result["network"], result["telemetry"]["link_counters"]
    count = max(len(found), result["telemetry"]["network_operations_count"])
    if not found:
        return section("Network activity", tag("p", "It asked for nothing.", class_="none"))
    start = result["began"]
    rows = [
        (
            since(start, each["timestamp"]),
            each["operation"],
            tag("code", target(each)),
            state("allowed" if each["allowed"] else "refused", good=each["allowed"]),
            tag("bdi", each["reason"]) if each["reason"] else "",
        )
        for each in found[:ROWS]
    ]
    link = ", ".join(f"{name} {value:,}" for name, value in counters.items())
    note = tag("p", f"Its empty link: {link}.", class_="note") if counters else ""
    listed = table(("At", "Operation", "What", "Answer", "Reason"), rows)
    return section(f"Network activity ({count:,})", listed, *more(found, count), note)


def target(record: Mapping[str, Any]) -> str:
    address, port = record["address"], record["port"]
    if address is None:
        return " ".join(filter(None, (record["family"], record["type"]))) or "a socket"
    if port is None:
        return f"{address} ({record['family']})" if record["family"] else str(address)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def processes(result: Result) -> Markup:
    found = result["telemetry"]["process_hierarchy"]
    if not found:
        return Markup("")
    rows = [
        (str(each["pid"]), str(each["ppid"]), tag("code", each["name"]), str(each["threads"]), each["status"])
        for each in found[:ROWS]
    ]
    note = tag(
        "p",
        "As the samples have seen them, with the host's numbers; what lived between two samples is not here.",
        class_="note",
    )
    return section(
        f"Processes ({len(found):,})", table(("PID", "Parent", "Name", "Threads", "When first seen"), rows), *more(found), note
    )


# -- what held it --------------------------------------------------------------------------------------------------------


def protections(result: Result) -> Markup:
    found = sorted(result["protections"], key=lambda each: -STATES.index(each["state"]))
    counts = {name: sum(each["state"] == name for each in found) for name in STATES}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    rows = [
        (
            each["name"],
            state(each["state"], good=each["state"] == ENFORCED, bad=each["state"] == MISSING),
            each["mechanism"],
            joined((tag("bdi", each["detail"]), tag("p", "Mend: ", each["mend"], class_="mend") if each.get("mend") else "")),
            each["checked"],
        )
        for each in found
    ]
    return section(
        "Protections", tag("p", f"{said}."), table(("Protection", "State", "Mechanism", "Detail", "How it was checked"), rows)
    )


def limits(result: Result) -> Markup:
    rows = [(name, "none" if value is None else f"{value:g}") for name, value in result["limits"].items()]
    listed = table(("PluginLimitsV2", "Value"), rows)
    return tag("section", tag("details", tag("summary", tag("h2", "All limits")), listed))


# -- what they are made of -----------------------------------------------------------------------------------------------


def section(title: str, *children: object) -> Markup:
    return tag("section", tag("h2", title), *children)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """On a narrow screen each row is a block, and each cell names its column. Columns without content are left out."""
    kept = list(rows)
    columns = [column for column in range(len(head)) if any(row[column] for row in kept)]
    titles = tag("tr", *(tag("th", head[column], scope="col") for column in columns))
    lines = (tag("tr", *(cell(head[column], row[column]) for column in columns)) for row in kept)
    return tag("table", tag("thead", titles), tag("tbody", *lines))


def cell(title: str, content: object) -> Markup:
    return tag("td", tag("div", content), data_label=title, class_=None if content else "empty")


def more(found: Sequence[object], count: int = 0) -> list[Markup]:
    """What a table has left out of the `count` that there were, of which `found` are kept."""
    count = max(count, len(found))
    left = count - min(len(found), ROWS)
    kept = "all of them" if count == len(found) else f"the first {len(found):,}"
    return [tag("p", f"and {left:,} more: --result-file has {kept}", class_="note")] if left else []


def state(name: str, *, good: bool, bad: bool | None = None) -> Markup:
    worst = not good if bad is None else bad
    return tag("span", name, class_=f"badge {'good' if good else 'bad' if worst else 'mild'}")


def facts_of(values: Mapping[str, Any]) -> str:
    return ", ".join(fact(name, value) for name, value in values.items())


def fact(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{name.replace('_', ' ')} {'yes' if value is True else 'no' if value is False else value}"
    plain = name.removesuffix("_mb")
    return f"{plain.replace('_', ' ')} {number(value)}{' MB' if plain != name else ''}"


def moment(stamp: str) -> Markup:
    """A time where the page was made, and in UTC."""
    when = datetime.fromisoformat(stamp).astimezone(UTC)
    local = when.astimezone()
    said = f"{when:%Y-%m-%d %H:%M:%S} UTC"
    if local.utcoffset():
        said = f"{local:%Y-%m-%d %H:%M:%S} UTC{local.isoformat()[-6:]} ({said})"
    return tag("time", said, datetime=when.isoformat(timespec="seconds"))


def since(start: str, stamp: str) -> str:
    """How long after the plugin began, as the clock has it."""
    passed = (datetime.fromisoformat(stamp) - datetime.fromisoformat(start)).total_seconds()
    return duration(max(0.0, passed))
