"A training that is killed anywhere and resumed ends in the same bits as one that was left in peace. See kill_cases.py."
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import environment


def kill(corpus: Path, home: Path, seed: int, cases: int) -> list[dict[str, object]]:
    "Run random cases in a process of their own; what each came to."
    text = home / "book.txt"
    text.write_text(corpus.read_text()[:1800])  # 24 steps read it twice
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "kill_cases.py"), str(text), str(home), str(seed), str(cases)],
                          capture_output=True, text=True, env=environment(), timeout=120 + 120 * cases)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == cases, done.stderr[-3000:]
    bad = [case for case in found if not case["same"] or case["left"]]
    assert not bad and done.returncode == 0, (bad, done.stderr[-3000:])
    return found


def test_three_kills(corpus: Path, tmp_path: Path) -> None:
    "Three cases: with accumulation, plain, and one of everything else. At least one really died of a signal."
    found = kill(corpus, tmp_path, seed=1, cases=3)
    assert found[0]["way"] == "accumulated" and any(case["ended"] != 0 for case in found)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_kills(seed: int, corpus: Path, tmp_path: Path) -> None:
    "Thirty more in all: every moment, every signal, every way of training."
    found = kill(corpus, tmp_path, seed, cases=10)
    assert {case["moment"] for case in found} == {"forward", "backward", "optimizer", "saving", "validating"}
