"""Says at the end which faults were survived: a line of JSON each, then the count."""

import json
import sys
from typing import Any

import pytest

FAULTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAULTS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call":
        faults = [value for name, value in report.user_properties if name == "fault"]
        item.config.stash.setdefault(FAULTS, []).extend(faults)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """To stderr: a worker of pytest-xdist has no other way to be heard."""
    if faults := session.config.stash.get(FAULTS, []):
        survived = sum(fault["passed"] for fault in faults)
        lines = [*map(json.dumps, faults)]
        lines.append(f"faults survived {survived} of {len(faults)}")
        print("", *lines, sep="\n", file=sys.stderr)
