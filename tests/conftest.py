"""The option --slow, the start of processes, and skipped tests.

A run ends with a list of the skipped tests by reason, and a skip without a reason fails.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import pytest

NO_REASON = ("", "unconditional skip")  # pytest's words for a skip and a mark without a reason
SHOWN = 3  # tests of one reason
LONGEST = "tests/test_readme.py"  # it starts first, because one process runs it while the others run the rest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def _lacks_gpu() -> bool:
    import torch  # slow import: a process that only hands out tests does without

    return not torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --slow"))
        if item.get_closest_marker("gpu") and _lacks_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, Any, Any]:
    """Keep the garbage collector from what lives to the end: it would go through all libraries again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture
def start_method() -> Iterator[Callable[[str], None]]:
    """A function that chooses how new processes start: by "fork" or "spawn"."""
    import torch.multiprocessing  # slow import

    before = torch.multiprocessing.get_start_method(allow_none=True)
    yield partial(torch.multiprocessing.set_start_method, force=True)
    torch.multiprocessing.set_start_method(before, force=True)


def _reason(report: Any) -> str | None:
    """The reason of a skip, None for other outcomes, an expected failure included."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    words = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(words).removeprefix("Skipped: ").removeprefix("Skipped").strip()


def _fail_without_reason(report: Any) -> Any:
    reason = _reason(report)
    if reason in NO_REASON or (reason or "").startswith("condition: "):
        report.outcome, report.longrepr = "failed", f"{report.nodeid}: skipped without a reason. Give one."
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _fail_without_reason((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _fail_without_reason((yield))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    names: dict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        names[_reason(report) or "?"].append(report.nodeid)
    if names:
        terminalreporter.section(f"{sum(map(len, names.values()))} skipped, and why")
    for reason, tests in sorted(names.items(), key=lambda pair: -len(pair[1])):
        more = f" and {len(tests) - SHOWN} more" if len(tests) > SHOWN else ""
        terminalreporter.line(f"{len(tests):4} {reason}: {', '.join(sorted(tests)[:SHOWN])}{more}")
