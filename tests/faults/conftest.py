"""Injects the faults of a module, two at a time, and says which were survived.

A module's FAULTS are its harness.Faults, and its one test is::

    def test_fault(fault, survived):
        survived(fault)

At the end comes a line of JSON for each, then the count.
"""

import concurrent.futures
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults import harness

AT_ONCE = 2  # a trainer waits for its imports and its disk half of the time
FAULTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAULTS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault" in metafunc.fixturenames:
        marks = {True: [pytest.mark.slow], False: []}
        faults = metafunc.module.FAULTS.values()
        cases = [pytest.param(f, id=f.id, marks=marks[f.slow]) for f in faults]
        metafunc.parametrize("fault", cases)


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, concurrent.futures.Future[harness.Result]]]:
    """Of the faults whose tests are to run, by id."""
    items = [item for item in request.session.items if item.path == request.path]
    chosen = [item.callspec.params["fault"] for item in items]
    lab = harness.Lab(tmp_path_factory.mktemp("faults"))
    at_once = getattr(request.module, "AT_ONCE", AT_ONCE)
    pool = concurrent.futures.ThreadPoolExecutor(at_once)
    for first in {(f.kind, f.flags, f.processes): f for f in chosen}.values():
        pool.submit(first.reference, lab)
    yield {f.id: pool.submit(harness.inject, f, lab) for f in chosen}
    pool.shutdown(wait=False, cancel_futures=True)
    lab.close()
    pool.shutdown()


@pytest.fixture
def survived(
    results: dict[str, concurrent.futures.Future[harness.Result]],
    record_property: Callable[[str, object], None],
) -> Callable[[harness.Fault], None]:
    def check(fault: harness.Fault) -> None:
        result = results[fault.id].result()
        record_property("fault", result.line())
        if result.error is not None:
            raise result.error

    return check


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
