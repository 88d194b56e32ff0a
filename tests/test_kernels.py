"The kernels in fresh processes: interpreted against float64, compiled ahead of time for GPUs that are not here, in the model, and missing."
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.kernels.gpu import Compiled, compile_module

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("flash", "norm", "rope", "glu", "loss")


def python(*args: str, interpret: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    "Run Python in the repository, with or without Triton's interpreter."
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)


def interpreted(family: str, dtype: str) -> subprocess.CompletedProcess[str]:
    return python("tests/kernel_checks.py", family, "--dtype", dtype, "--quiet")


def compiled(module: str, target: str) -> list[Compiled]:
    return compile_module(f"kernels.{module}", [target])


@pytest.fixture(scope="session")
def started(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    "The long jobs of this run, begun together: each is a process of its own, and one at a time would leave cores idle."
    work = {"test_interpreted": interpreted, "test_compiled": compiled}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {i.name: pool.submit(work[i.originalname], **i.callspec.params) for i in request.session.items if getattr(i, "originalname", "") in work}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", ["flash", "loss", "decode", "norm", "rope", "glu"])
def test_interpreted(family: str, dtype: str, started: dict[str, Future[Any]], request: pytest.FixtureRequest) -> None:
    "Forward and every gradient against float64, on random shapes, layouts and options."
    done = started[request.node.name].result()
    assert done.returncode == 0 and " 0 failed" in done.stdout, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("module", MODULES)
def test_compiled(module: str, target: str, started: dict[str, Future[Any]], request: pytest.FixtureRequest) -> None:
    "Every shipped configuration compiles without a spill, within shared memory, and with its tensor cores."
    rows = started[request.node.name].result()
    assert rows and not [p for r in rows for p in r.problems]
    assert any(r.matrix for r in rows) == any(r.matmul for r in rows)


MODEL = """
import itertools, torch
from fundamentallm.model import LanguageModel, ModelConfig
torch.manual_seed(0)
worst = 0.0
shapes = [dict(norm=n, positions=p, activation=a, bias=b, qk_norm=q, n_kv_heads=kv, tie=t) for n, p, a, b, q, kv, t in [
    ("rmsnorm", "rope", "swiglu", False, True, 1, True), ("layernorm", "learned", "gelu", True, False, 4, False),
    ("layernorm", "alibi", "swiglu", True, False, 2, True), ("rmsnorm", "none", "gelu", False, True, 4, True), ("layernorm", "rope", "swiglu", False, False, 2, False)]]
for shape in shapes:
    models = [LanguageModel(ModelConfig(vocab_size=37, context=19, dim=24, n_layers=2, n_heads=4, impl=i, **({"d_head": 6} | shape))) for i in ("torch", "triton")]
    models[1].load_state_dict(models[0].state_dict())
    for p in models[0].parameters(): torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(37, (2, 19)); targets = torch.randint(37, (2, 19)); targets[0, :3] = -100
    logits, losses, grads = [], [], []
    for m in models:
        logits.append(m(ids)); losses.append(m.loss(ids, targets)); grads.append(torch.autograd.grad(losses[-1], list(m.parameters())))
    for name, a, b in [("logits", *logits), ("loss", *losses), *((n, x, y) for (n, _), x, y in zip(models[0].named_parameters(), *grads))]:
        error = float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1e-12)); worst = max(worst, error)
        assert error < 2e-5, (shape, name, error)
    with torch.no_grad():   # one token at a time, from a cache
        cache = models[1].new_cache(2)
        steps = torch.cat([models[1](ids[:, t:t + 1], cache) for t in range(19)], 1)
    assert torch.allclose(steps, logits[0], atol=1e-4), shape
    if shape["norm"] == "rmsnorm" and shape["positions"] == "rope" or shape["positions"] == "alibi":
        assert torch.allclose(torch.compile(models[1].loss, fullgraph=True)(ids, targets), losses[0], atol=1e-5), shape
print(f"worst relative error {worst:.1e}")
"""


def test_one_model_two_engines() -> None:
    "impl=triton equals impl=torch: logits, loss, every gradient, decoding from a cache, and compiled into one graph."
    done = python("-c", MODEL)
    assert done.returncode == 0 and "worst relative error" in done.stdout, done.stderr[-3000:]


def test_no_gpu_says_so() -> None:
    "Without a GPU and without the interpreter, impl=triton is refused in one line and auto is PyTorch."
    code = """
import torch
from fundamentallm.kernels.norm import rms_norm
x, w = torch.randn(3, 8), torch.ones(8)
assert torch.equal(rms_norm(x, w), rms_norm(x, w, impl="torch"))
try: rms_norm(x, w, impl="triton")
except RuntimeError as e: print(e)
"""
    done = python("-c", code, interpret=False, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and "GPU" in done.stdout and "TRITON_INTERPRET" in done.stdout, done.stderr[-2000:]


def test_without_triton(tmp_path: Path) -> None:
    "Where Triton has no wheel everything imports, auto is PyTorch, and impl=triton says what to install."
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')\n")
    code = """
import torch
import fundamentallm.kernels.flash, fundamentallm.kernels.loss, fundamentallm.kernels.rope, fundamentallm.kernels.glu
from fundamentallm.kernels.norm import rms_norm
from fundamentallm.model import LanguageModel, ModelConfig
LanguageModel(ModelConfig(vocab_size=9, dim=16, n_heads=2))(torch.zeros(1, 3, dtype=torch.long))
try: rms_norm(torch.randn(3, 8), torch.ones(8), impl="triton")
except RuntimeError as e: print(e)
"""
    done = python("-c", code, interpret=False, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0 and "pip install triton" in done.stdout, done.stderr[-2000:]


def test_gpu_command_says_there_is_none() -> None:
    "`make gpu` on a machine without one: a line that says so and what to do, exit code 1."
    done = python("tools/gpu.py", interpret=False, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and done.stderr.startswith("Error: no GPU here") and "Traceback" not in done.stderr


def test_training_refuses_before_it_begins(tmp_path: Path) -> None:
    "`model.impl=triton` without a GPU: one line, and nothing on disk."
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("To be, or not to be, that is the question.\n" * 200)
    done = python("-c", "from fundamentallm.cli import main; main()", "train", str(text), "--preset", "tiny", "model.impl=triton", "-o", str(run), interpret=False, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and done.stderr.startswith("Error: model.impl: impl='triton' needs tensors on a GPU") and len(done.stderr.splitlines()) == 1, done.stderr
    assert not run.exists()
