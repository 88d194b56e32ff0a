"""Each notebook's unexported cells, run against the exported module: what coverage measures (see tools/run_coverage.py).

Not named test_*.py: `make test` runs the notebooks themselves, and this would run every cell a second time."""
from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.process import NBProcessor

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(NBS.glob("[0-9]*.ipynb"))


def runs(cell) -> bool:  # type: ignore[no-untyped-def]
    "A code cell that the tests run and that is not exported."
    if cell.cell_type != "code": return False
    d = getattr(cell, "directives_", None) or {}
    skip = set(get_config().tst_flags.split()) | {"export", "exports", "exporti", "default_exp"}
    return not (skip & d.keys()) and d.get("eval:", [""])[0].lower() != "false"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The cells of one notebook pass against its module."
    from execnb.shell import CaptureShell

    monkeypatch.chdir(NBS)
    nb = NBProcessor(path, process=True).nb
    module = importlib.import_module("fundamentallm." + re.sub(r"^\d+_", "", path.stem))
    shell = CaptureShell(path)
    shell.user_ns.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
    shell.run_all(nb, exc_stop=True, preproc=lambda c: not runs(c))
    assert not shell.exc, f"{path.name}: {shell.exc}"
