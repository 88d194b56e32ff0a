"What the end-to-end tests share: the real command in a process of its own, a small text, and one tiny trained run."
from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).parent / "fundamentallm"
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-c", "from fundamentallm.cli import main; main()"]
ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**more: str) -> dict[str, str]:
    "This process's, without what changes output, and with the package of this checkout."
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONWARNINGS")}
    path = os.pathsep.join(filter(None, [more.pop("PYTHONPATH", ""), str(ROOT)]))
    return {**env, "PYTHONPATH": path, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1", **more}


def fundamentallm(*words: str | Path, cwd: Path | None = None, stdin: str = "", env: dict[str, str] | None = None,
                  prefix: Sequence[str] = (), timeout: float = 120) -> subprocess.CompletedProcess[str]:
    "Run the command with these words; stdout and stderr are pipes."
    return subprocess.run([*prefix, *COMMAND, *map(str, words)], cwd=cwd, input=stdin, capture_output=True, text=True,
                          env=environment(**(env or {})), timeout=timeout)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "20 kB of made-up sentences."
    rng, words = random.Random(0), "the king of a merry land went out to sea and never came back but sang old songs".split()
    lines = [" ".join(rng.choices(words, k=rng.randint(4, 9))).capitalize() + "." for _ in range(650)]
    path = tmp_path_factory.mktemp("corpus") / "book.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    "`fundamentallm train book.txt --preset tiny` in a directory of its own: what the command printed; its args hold the directory."
    cwd = tmp_path_factory.mktemp("work")
    (cwd / "book.txt").write_bytes(corpus.read_bytes())
    done = fundamentallm("train", "book.txt", "--preset", "tiny", cwd=cwd)
    assert done.returncode == 0, done.stderr
    done.args = cwd
    return done


@pytest.fixture(scope="session")
def cwd(trained: subprocess.CompletedProcess[str]) -> Path:
    "The directory in which book.txt and runs/book are."
    return Path(str(trained.args))


@pytest.fixture(scope="session")
def run_dir(cwd: Path) -> Path:
    "The tiny trained run. Read only: copy it before you change it."
    return cwd / "runs" / "book"
