"""A pytest plugin for runs under an older diffusers: what that version lacks is skipped, and says so.

It knows a class, module, constructor argument or forward argument that is not there, and a pipeline that
refuses the arguments it is given, where a test asked for it: never where ``dit_sparse`` did.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import diffusers
import pytest

_TESTS = str(Path(__file__).parents[1])
_OWN = tuple(
    str(Path(_TESTS).parent / name) for name in ("tests", "dit_sparse", "pipelines", "kernels", "eval")
)
_LACKS = re.compile(
    r"cannot import name .* from 'diffusers|No module named 'diffusers|module diffusers.* has no attribute"
    r"|(__init__|__call__|forward)\(\) got an unexpected keyword argument"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    if call.excinfo is None or not report.failed:
        return report
    trace, error = call.excinfo.traceback, call.excinfo.value
    asked_by = [str(entry.path) for entry in trace if str(entry.path).startswith(_OWN)]
    if not asked_by or not asked_by[-1].startswith(_TESTS):
        return report
    names_it = isinstance(error, ImportError | AttributeError | TypeError) and _LACKS.search(str(error))
    refuses = isinstance(error, ValueError) and trace[-1].name == "check_inputs"
    if names_it or refuses:
        report.outcome = "skipped"
        report.longrepr = str(item.path), None, f"diffusers {diffusers.__version__}: {error}"
    return report
