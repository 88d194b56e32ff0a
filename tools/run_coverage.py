"""Branch coverage of the package over the notebooks' cells and tests/; fails under 90%.

A notebook defines its functions in its own namespace, so running it says nothing about the exported module. Here its
unexported cells run against the module instead: same examples, same assertions, the shipped code. The chapters of kernels need Triton's
interpreter, the others must not have it. The ahead-of-time builds for each GPU run no line that the chapters do not run."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOOR = 90  # percent


def main() -> int:
    env = {**os.environ, "MPLBACKEND": "Agg", "COVERAGE_PROCESS_START": str(ROOT / "pyproject.toml"), "COVERAGE_CORE": "ctrace"}
    run = [sys.executable, "-m", "coverage"]
    subprocess.run([*run, "erase"], cwd=ROOT, check=True)
    failed = 0
    for interpret, which in (("0", "not test_compiled and not (test_cells and kernels)"), ("1", "test_cells and kernels")):  # read when triton is imported: two processes
        command = [*run, "run", "-m", "pytest", "-o", "python_files=test_*.py notebook_cells.py", "tests", "--durations=5", "-k", which]
        failed |= subprocess.run(command, cwd=ROOT, env={**env, "TRITON_INTERPRET": interpret}).returncode
    subprocess.run([*run, "combine", "--quiet"], cwd=ROOT, check=False)
    report = subprocess.run([*run, "report", "--show-missing", f"--fail-under={FLOOR}"], cwd=ROOT).returncode
    if failed: print("some tests failed: the coverage figure is of a failed run")
    return failed or report


if __name__ == "__main__": sys.exit(main())
