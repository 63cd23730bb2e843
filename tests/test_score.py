"""Ratings: stricter settings never rate worse, whatever opens a sandbox rates worse, and the mends named do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from sandbox import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, host, recipe, score
from sandbox.recipe_data import MISSING, SUBSTITUTED

IDEAL = host.ideal()
BARE = replace(
    IDEAL, root=False, user_namespaces="switched off", cgroup_kind="", cgroup_folder="", controllers=(), landlock_abi=0
)


def rated(
    level: IsolationLevel, facts: host.HostFacts = IDEAL, limits: dict[str, Any] | None = None, **permissions: Any
) -> score.Rating:
    settings = IsolationConfig(level=level), PluginLimitsV2(**(limits or {})), PluginPermissionsV2(**permissions)
    return score.rate(recipe.compile(*settings, facts, strict=False))


@pytest.mark.parametrize("facts", [IDEAL, BARE], ids=["ideal", "bare"])
def test_a_stricter_level_is_never_worse(facts: host.HostFacts) -> None:
    found = [rated(level, facts).exposure for level in IsolationLevel]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) >= 3
    assert all(0 <= each <= 10 for each in found)
    assert all(rated(level, BARE).exposure > rated(level).exposure for level in IsolationLevel)


OPENED: dict[str, dict[str, Any]] = {
    "a folder": {"allowed_directories": ["/opt"]},
    "a host": {"allow_network_access": True, "allowed_hosts": ["192.0.2.1:443"]},
    "processes": {"allow_subprocess_execution": True, "limits": {"max_subprocess_count": 4}},
}


@pytest.mark.parametrize("level", IsolationLevel, ids=lambda level: level.value)
@pytest.mark.parametrize("what", OPENED)
def test_what_is_permitted_is_open(level: IsolationLevel, what: str) -> None:
    assert rated(level, **OPENED[what]).exposure > rated(level).exposure


def test_the_whole_internet_is_more_than_a_network_and_that_more_than_a_host() -> None:
    def open_to(*hosts: str) -> float:
        return rated(IsolationLevel.STRICT, allow_network_access=True, allowed_hosts=list(hosts)).exposure

    assert open_to("*") > open_to("192.0.2.0/24") > open_to("192.0.2.1:443") > open_to()


def test_each_check_counts_and_points_add_up() -> None:
    rating = rated(IsolationLevel.MINIMAL, BARE, allow_network_access=False)
    assert {finding.name for finding in rating.findings} == {name for name, _, _ in score.CHECKS}
    assert sum(finding.points for finding in rating.findings) == pytest.approx(rating.exposure, abs=0.2)
    assert [finding.points for finding in rating.findings] == sorted((each.points for each in rating.findings), reverse=True)
    assert len(rating.best_mends()) == 3
    assert all(0 <= finding.open <= 1 for finding in rating.findings)


def test_a_protection_of_a_running_sandbox_counts_as_it_was_read_back() -> None:
    made = recipe.compile(IsolationConfig(level=IsolationLevel.STRICT), PluginLimitsV2(), PluginPermissionsV2(), IDEAL)
    best = score.rate(made).exposure
    for name in ("no_new_privs", "PID namespace", "memory", "writes only to the workspace"):
        weaker = [each.replace(state=SUBSTITUTED) if each.name == name else each for each in made.protections]
        gone = [each.replace(state=MISSING) if each.name == name else each for each in made.protections]
        assert best < score.rate(made, weaker).exposure < score.rate(made, gone).exposure


def test_the_mend_named_first_makes_it_better() -> None:
    rating = rated(IsolationLevel.STANDARD)
    assert "level strict" in rating.best_mends()[0].mend
    assert rated(IsolationLevel.STRICT).exposure < rating.exposure


def test_the_command() -> None:
    command = [sys.executable, "-m", "sandbox.cli", "score"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [each["level"] for each in found] == [level.value for level in IsolationLevel]
    assert set(found[0]["findings"][0]) == {"name", "weight", "open", "points", "seen", "mend"}
    done = subprocess.run([*command, "--level", "strict"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("level strict: exposure ")
    done = subprocess.run([*command, "--level", "high"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (125, "", 1)
