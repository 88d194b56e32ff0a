"Run every notebook as a test (nbdev's runner) and every file of tests/ with pytest, several at a time; end on a line that counts both."
from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SLOW_CHAPTER = 60  # seconds a chapter may take on two cores; more is reported, not failed: machines differ
GIVE_UP = 900      # seconds after which a chapter hangs
LONG = ("test_cli.py", "test_prepare.py", "test_kernels.py")  # begun first: what ends last should not begin last


class Outcome(NamedTuple):
    "What one notebook or one file of tests said."
    passed: int
    failed: int
    skipped: int
    seconds: float
    output: str = ""  # of pytest, to be shown if something failed


Plain = tuple[int, int, int, float, str]  # an Outcome on its way between processes: a notebook may leave __main__ in a state in which a class cannot be pickled


def run_notebook(path: str, flags: list[str]) -> Plain:
    "One notebook in this process."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    def give_up(*_: object) -> None: raise TimeoutError(f"{Path(path).name} did not end within {GIVE_UP} s")
    if hasattr(signal, "SIGALRM"): signal.signal(signal.SIGALRM, give_up); signal.alarm(GIVE_UP)
    try: ok, seconds = test_nb(Path(path), skip_flags=get_config().tst_flags.split(), force_flags=flags, basepath=ROOT)
    finally:
        if hasattr(signal, "SIGALRM"): signal.alarm(0)
    return int(ok), int(not ok), 0, float(seconds), ""


class Counter:
    "A pytest plugin that counts the outcomes."
    def __init__(self) -> None: self.passed = self.failed = self.skipped = 0
    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.skipped: self.skipped += 1
        elif report.failed: self.failed += 1
        elif report.when == "call": self.passed += 1
    def pytest_collectreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.failed: self.failed += 1


def run_file(path: str) -> Plain:
    "One file of tests in this process."
    import pytest

    tests, said, start = Counter(), io.StringIO(), time.time()
    with redirect_stdout(said), redirect_stderr(said): code = pytest.main([path, "--durations=5", "-p", "no:cacheprovider"], plugins=[tests])
    if code not in (0, 1): tests.failed += 1  # interrupted, an internal error, nothing collected
    return tests.passed, tests.failed, tests.skipped, time.time() - start, said.getvalue()


def run_all(paths: list[Path], flags: list[str], workers: int) -> dict[str, Outcome]:
    "All of them, some at a time; a process that dies fails its own alone."
    from multiprocessing import get_context

    done: dict[str, Outcome] = {}
    # a fresh process for each: what one imports or sets must not help another
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {pool.submit(run_notebook, str(p), flags) if p.suffix == ".ipynb" else pool.submit(run_file, str(p)): p for p in paths}
        for job in as_completed(jobs):
            name = jobs[job].name
            try: o = Outcome(*job.result())
            except Exception as e: o = Outcome(0, 1, 0, 0.0, f"{name}: {type(e).__name__}: {e}")
            done[name] = o
            if o.failed: print(o.output, file=sys.stderr)
            chapter = name.endswith(".ipynb")
            note = "   over a minute: shorten it or mark cells #| slow" if chapter and o.seconds > SLOW_CHAPTER else ""
            count = "" if chapter else f", {o.passed} passed" + (f", {o.failed} failed" if o.failed else "")
            print(f"  {'FAILED' if o.failed else 'ok    '} {o.seconds:6.1f} s  {name}{count}{note}", flush=True)
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
    tests = [] if a.notebooks else sorted((ROOT / "tests").glob("test_*.py"), key=lambda p: (p.name not in LONG, p.name))
    paths = (tests if a.only != "notebooks" else []) + (notebooks if a.only != "tests" else [])
    print(f"{len(paths)} notebooks and files of tests, {a.workers} at a time")
    done = run_all(paths, a.flags.split(), a.workers)
    chapters, rest = ([o for name, o in done.items() if name.endswith(".ipynb") is kind] for kind in (True, False))
    passed, failed, skipped = (sum(getattr(o, what) for o in done.values()) for what in ("passed", "failed", "skipped"))
    print(f"in {time.time() - start:.0f} s: {len(chapters)} notebooks and {sum(o.passed + o.failed for o in rest)} tests")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""), flush=True)
    return 1 if failed or not passed else 0


if __name__ == "__main__": sys.exit(main())
