"""Runs parts of the suite under other versions of diffusers and records the outcome in README.md.

    make compat                              every version
    .venv/bin/python tests/compat.py 0.38.0  one of them

An older diffusers stands before the installed one on the path; torch and transformers are those of the tested
set, and httpx, which old versions need, comes with it. Of the contract one step-cached method is run in every
family.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
VERSIONS = ("0.36.0", "0.38.0", "0.40.0", "0.42.1")
SUITES = {
    "redirect and sessions": ["tests/test_redirect.py", "tests/test_attach.py", "tests/test_compile.py"],
    "contract": ["tests/test_contract.py", "-m", "", "-k", "step-cached and (full_budget or restores)"],
    "interoperation": ["tests/interop"],
    "pipelines": ["tests/pipelines", "--ignore=tests/pipelines/test_full_size.py"],
}
BEGIN, END = "<!-- written by make compat -->", "<!-- end -->"


def folder(version: str) -> Path:
    """Where a version of diffusers is installed by itself."""
    target = ROOT / "build" / "compat" / version
    if not (target / "diffusers").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, f"diffusers=={version}", "httpx", "httpcore"], check=True)
    return target


def outcome(version: str, suite: str) -> tuple[int, int, int]:
    """Tests of a suite that (passed, failed, were skipped) under a version."""
    path, result = folder(version), ROOT / "build" / "compat" / f"{version} {suite}.xml"
    options = ["-p", "lacks", "-p", "no:cacheprovider", "-rs", "--tb=short", f"--junitxml={result}"]
    places = os.pathsep.join([str(path), str(ROOT / "tests" / "support")])
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "pytest", *options, *SUITES[suite]], cwd=ROOT, env=environment)
    (counts,) = ElementTree.parse(result).getroot().iter("testsuite")
    total, failed, skipped = (int(counts.attrib[k]) for k in ("tests", "failures", "skipped"))
    failed += int(counts.attrib["errors"])
    return total - failed - skipped, failed, skipped


def record(version: str, outcomes: dict[str, tuple[int, int, int]]) -> None:
    """Put a row into the table of README.md, passed / failed / skipped in each suite."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, table, after = re.split(f"{re.escape(BEGIN)}\n|{re.escape(END)}", text)
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if re.match(r"\| \d", line)}
    cells = [" / ".join(map(str, outcomes[suite])) for suite in SUITES]
    rows[version] = f"| {version} | " + " | ".join(cells) + " |"
    head = ["| diffusers | " + " | ".join(SUITES) + " |", "| --- |" + " --- |" * len(SUITES)]
    lines = "\n".join([*head, *(rows[v] for v in sorted(rows, key=lambda v: [*map(int, v.split("."))]))])
    readme.write_text(f"{before}{BEGIN}\n{lines}\n{END}{after}")


if __name__ == "__main__":
    failed = 0
    for version in sys.argv[1:] or VERSIONS:
        outcomes = {suite: outcome(version, suite) for suite in SUITES}
        record(version, outcomes)
        failed += sum(f for _, f, _ in outcomes.values())
    sys.exit(failed > 0)
