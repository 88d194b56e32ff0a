"Run every notebook as a test (nbdev's runner, in parallel), then tests/ with pytest; end on a line that counts both."
from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLOW_CHAPTER = 60  # seconds a chapter may take on two cores; more is reported, not failed: machines differ
GIVE_UP = 900      # seconds after which a chapter hangs


def run_notebook(path: str, flags: list[str]) -> tuple[bool, float]:
    "One notebook in this process: (did every cell pass, seconds)."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    def give_up(*_: object) -> None: raise TimeoutError(f"{Path(path).name} did not end within {GIVE_UP} s")
    if hasattr(signal, "SIGALRM"): signal.signal(signal.SIGALRM, give_up); signal.alarm(GIVE_UP)
    try: return test_nb(Path(path), skip_flags=get_config().tst_flags.split(), force_flags=flags, basepath=ROOT)
    finally:
        if hasattr(signal, "SIGALRM"): signal.alarm(0)


class Counter:
    "A pytest plugin that counts the outcomes."
    def __init__(self) -> None: self.passed = self.failed = self.skipped = 0
    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.skipped: self.skipped += 1
        elif report.failed: self.failed += 1
        elif report.when == "call": self.passed += 1
    def pytest_collectreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.failed: self.failed += 1


def run_notebooks(notebooks: list[Path], flags: list[str], workers: int) -> dict[str, bool]:
    "All notebooks, two at a time; a process that dies fails its notebook alone."
    from multiprocessing import get_context

    done: dict[str, bool] = {}
    times: dict[str, float] = {}
    # a fresh process for each notebook: what one imports or sets must not help another
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {pool.submit(run_notebook, str(p), flags): p for p in notebooks}
        for job in as_completed(jobs):
            name = jobs[job].name
            try: done[name], times[name] = job.result()
            except Exception as e: done[name], times[name] = False, 0.0; print(f"{name}: {type(e).__name__}: {e}", file=sys.stderr)
            slow = "   over a minute: shorten it or mark cells #| slow" if times[name] > SLOW_CHAPTER else ""
            print(f"  {'ok    ' if done[name] else 'FAILED'} {times[name]:6.1f} s  {name}{slow}", flush=True)
    return done


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("notebooks", nargs="*", help="notebooks to run (default: all)")
    ap.add_argument("--flags", default="", help="nbdev flags to run that are skipped by default: 'slow', 'gpu'")
    ap.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4))
    ap.add_argument("--only", choices=["notebooks", "tests"], help="run one half")
    a = ap.parse_args()
    os.chdir(ROOT)
    for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(k, str(max(1, (os.cpu_count() or 1) // a.workers)))
    os.environ.setdefault("MPLBACKEND", "Agg")
    from nbdev.doclinks import nbglob

    start, notebooks = time.time(), [Path(p).resolve() for p in a.notebooks] or sorted(Path(p).resolve() for p in nbglob(ROOT / "nbs", as_path=True))
    done, tests = {}, Counter()
    if a.only != "tests":
        print(f"{len(notebooks)} notebooks, {a.workers} at a time")
        done = run_notebooks(notebooks, a.flags.split(), a.workers)
    if a.only != "notebooks" and not a.notebooks:
        import pytest

        code = pytest.main(["tests", "--durations=5"], plugins=[tests])
        if code not in (0, 1): tests.failed += 1  # interrupted, an internal error, nothing collected
    passed, failed = sum(done.values()) + tests.passed, sum(not ok for ok in done.values()) + tests.failed
    print(f"in {time.time() - start:.0f} s: {len(done)} notebooks and {tests.passed + tests.failed} tests")
    print(f"{passed} passed, {failed} failed" + (f", {tests.skipped} skipped" if tests.skipped else ""), flush=True)
    return 1 if failed or not passed else 0


if __name__ == "__main__": sys.exit(main())
