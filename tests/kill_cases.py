"""Kill a training in the middle of something, resume it, and compare it to the bit with one that was left in peace.

`python tests/kill_cases.py TEXT DIR SEED CASES` runs that many random cases and prints one line of JSON for each. torch is imported once; every training
is a forked process of its own, which really dies: the signal is sent by the process to itself, at the chosen moment of the chosen step.
"""
from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fundamentallm import checkpoint, core, trainer
from fundamentallm.config import Config, load_config, replace

STEPS = 24
MOMENTS = ("forward", "backward", "optimizer", "saving", "validating")
WAYS = {  # name -> overrides: what a run may be like; each is killed and resumed
    "plain": [], "accumulated": ["train.accumulate=3", "train.batch_size=4"], "averaged": ["train.ema=0.9"], "recomputed": ["train.recompute=true"],
    "bf16": ["train.precision=bf16"], "background": ["train.background=true"], "muon": ["optim.name=muon"], "patient": ["train.patience=3"]}


def settings(text: str, way: str) -> Config:
    "A tiny run with dropout that reads its text twice: 24 steps of 8 rows, a validation every 5, a checkpoint every 7."
    common = ["model.dropout=0.2", "model.context=16", "model.dim=16", "train.precision=fp32", f"train.steps={STEPS}", "train.eval_every=5", "train.checkpoint_every=7",
              "train.eval_tokens=400", "train.sample_every=0", "train.threads=1", "optim.lr=5e-3"]
    return replace(load_config("tiny", [*common, *WAYS[way]]), {"data.path": text})


def strike(moment: str, step: int, number: int, nth: int) -> Callable[[], None]:
    "Arrange for signal `number` to come in a step, at a moment; where that has several places (files written, rows validated), at the nth."
    seen = {"step": 0, "n": 0}

    def hit() -> None:
        if seen["n"] == nth: os.kill(os.getpid(), number)
        seen["n"] += 1

    def patched(owner: Any, name: str, when: Callable[[], bool], after: bool = False) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kw: Any) -> Any:
            if when() and not after: hit()
            result = real(*args, **kw)
            if when() and after: hit()
            return result
        mock.patch.object(owner, name, wrapped).start()

    def here() -> bool: return seen["step"] == step
    real_update = trainer.Stepper.update

    def update(self: trainer.Stepper, at: int) -> Any:
        seen["step"] = at + 1
        return real_update(self, at)
    mock.patch.object(trainer.Stepper, "update", update).start()
    if moment == "forward": patched(trainer.LanguageModel, "loss", here, after=True)
    if moment == "backward": patched(torch.Tensor, "backward", here, after=True)
    if moment == "optimizer": patched(torch.optim.Optimizer, "zero_grad", here)
    if moment == "saving":
        for name in ("fsync", "rename", "replace", "mkdir", "symlink"): patched(os, name, lambda: seen["step"] >= step)
    if moment == "validating": patched(trainer.LanguageModel, "loss", lambda: seen["step"] >= step and not torch.is_grad_enabled())
    return lambda: None


def forked(work: Callable[[], None]) -> int:
    "The exit code of a process that does the work: negative for the signal that ended it."
    pid = os.fork()
    if pid == 0:
        code = 1
        try: work(); code = 0
        except trainer.Interrupted: code = 0
        except BaseException: traceback.print_exc()
        finally:
            with suppress(Exception): sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def facts(run: Path) -> dict[str, str]:
    "Everything that must be equal: weights, all of the training state but the clock, the losses, norms and rates of every step."
    last = checkpoint.find_checkpoint(run, "last")
    checkpoint.verify(last)
    state = json.loads((last / "training_state.json").read_text())
    state["state"].pop("elapsed")
    events = [{k: e[k] for k in ("step", "loss", "lr", "grad_norm", "val_loss") if k in e} for e in trainer.read_events(run)]
    digest = {"state": json.dumps(state, sort_keys=True), "events": json.dumps(events)}
    return {**{k: hashlib.sha256(v.encode()).hexdigest() for k, v in digest.items()}, "steps": str(len(events)),
            **{f: core.sha256(last / f) for f in ("model.safetensors", "training_state.safetensors")}}


def one(text: str, home: Path, way: str, moment: str, step: int, number: int, nth: int) -> dict[str, Any]:
    "Peace (once a way), then kill and resume until the run has come to its end."
    config, peace, run = settings(text, way), home / f"peace-{way}", home / "run"

    def fit(**how: Any) -> None: trainer.train(config, run, progress=False, **how)
    if not peace.exists():
        assert forked(lambda: (trainer.train(config, peace, progress=False), None)[1]) == 0, way
    shutil.rmtree(run, ignore_errors=True)
    ended = forked(lambda: (strike(moment, step, number, nth)(), fit())[1])
    began = trainer.is_run(run)
    again = forked(lambda: fit(resume=True) if began else fit(overwrite=True))
    same = again == 0 and facts(run) == facts(peace)
    left = [p.name for p in (run / "checkpoints").glob(".*")] if same else []
    return {"way": way, "moment": moment, "step": step, "signal": signal.Signals(number).name, "nth": nth, "ended": ended, "resumed": again, "same": same, "left": left}


def main(text: str, home: str, seed: str, cases: str) -> None:
    "Random cases, one line of JSON each; the exit code says whether all of them ended in the same bits."
    rng, good = random.Random(int(seed)), True
    torch.set_num_threads(1)
    ways = list(WAYS)
    for i in range(int(cases)):
        moment, number = MOMENTS[i % len(MOMENTS)], (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[rng.randrange(4)]
        nth = rng.randrange(40) if moment == "saving" else rng.randrange(3) if moment == "validating" else 0
        step = rng.randrange(1, STEPS - 4) if moment in ("saving", "validating") else rng.randrange(1, STEPS + 1)
        result = one(text, Path(home), rng.choice(ways) if i >= 2 else ("accumulated", "plain")[i], moment, step, number, nth)
        print(json.dumps(result), flush=True)
        good &= result["same"] and not result["left"]
    sys.exit(not good)


if __name__ == "__main__": main(*sys.argv[1:])
