"""Says at the end how many bad inputs were tried, and what came of each."""

import collections
import sys
from typing import Any

import pytest

OUTCOMES = pytest.StashKey[list[tuple[str, str]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call":
        found = [value for name, value in report.user_properties if name == "outcome"]
        item.config.stash.setdefault(OUTCOMES, []).extend(
            (item.callspec.id, outcome) for outcome in found
        )
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """To stderr: a worker of pytest-xdist has no other way to be heard."""
    if outcomes := session.config.stash.get(OUTCOMES, []):
        counts = collections.Counter(outcome for _, outcome in outcomes)
        lines = [f"{name}: {o}" for name, o in outcomes if o != "clear"]
        lines.append(f"bad inputs: {len(outcomes)} tried, {counts['clear']} clear")
        print("", *lines, sep="\n", file=sys.stderr)
