"""`make gpu`: every kernel test natively in fp16 and bf16 at real sizes, then benchmarks beside PyTorch, torch.compile and Liger; one JSON.

One command, no network; it needs torch, triton, numpy and this package's core. Each figure is a median over CUDA events, inputs rotated past
the L2 cache, and stands beside its floor: bytes over the copy rate and operations over the matmul rate, both measured in the same run."""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from fundamentallm.core import atomic_file  # noqa: E402
from fundamentallm.kernels.gpu import Machine, floor, gpu_seconds, triton  # noqa: E402

Fn = Callable[..., Any]
BF16 = torch.bfloat16


@dataclass
class Bench:
    "One operation at one size: who is timed, on what, and what it must move and compute."
    kernel: str
    shape: str
    make: Callable[[], tuple[Tensor, ...]]      # fresh arguments for every implementation
    impls: dict[str, Callable[[], Fn]]          # name -> makes the function (imports, compiles): may fail, and is then reported
    bytes: float
    flops: float = 0.0
    backward: bool = False
    leaves: tuple[int, ...] = field(default=())  # which arguments get gradients


def rand(*shape: int, std: float = 1.0) -> Tensor: return torch.randn(*shape, device="cuda", dtype=BF16) * std


def compiled(fn: Fn) -> Fn: return torch.compile(fn, dynamic=False)


def liger(path: str, name: str) -> Fn:
    "A function of Liger Kernel, where it is installed."
    import importlib
    return getattr(importlib.import_module(f"liger_kernel.{path}"), name)


# ---- what is measured ----

def attention_benches() -> Iterator[Bench]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fundamentallm.kernels.flash import flash_attention

    def sdpa(backend: SDPBackend) -> Fn:
        def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend): return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return f

    def flex(T: int) -> Fn:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")
        return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)

    for D, T, H, H_kv in ((128, 2048, 16, 16), (128, 8192, 16, 16), (128, 16384, 16, 4), (64, 8192, 32, 32), (256, 8192, 8, 8)):
        B = 16384 // T
        make = partial(lambda B, H, K, T, D: (rand(B, H, T, D), rand(B, K, T, D), rand(B, K, T, D)), B, H, H_kv, T, D)
        impls = {"ours": lambda: partial(flash_attention, causal=True, impl="triton"), "torch (flash)": partial(sdpa, SDPBackend.FLASH_ATTENTION),
                 "torch (cudnn)": partial(sdpa, SDPBackend.CUDNN_ATTENTION)}
        if H == H_kv: impls["flex"] = partial(flex, T)
        flops, size = 2 * B * H * T * T * D, 2 * B * T * D * (2 * H + 2 * H_kv)  # causal: half of 4 B H T^2 D
        shape = f"B{B} H{H}/{H_kv} T{T} D{D} causal bf16"
        yield Bench("attention forward", shape, make, impls, size, flops)
        yield Bench("attention backward", shape, make, impls, 2 * size, 2.5 * flops, True, (0, 1, 2))


def decode_bench(B: int, room: int, H: int = 32, H_kv: int = 8, D: int = 128) -> Bench:
    from fundamentallm.kernels.flash import flash_decode

    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
    impls: dict[str, Callable[[], Fn]] = {"ours": lambda: partial(flash_decode, lengths=room, impl="triton"), "torch": lambda: sdpa, "compile": lambda: compiled(sdpa)}
    return Bench("decode", f"B{B} H{H}/{H_kv} keys {room} D{D} bf16", lambda: (rand(B, H, 1, D), rand(B, H_kv, room, D), rand(B, H_kv, room, D)), impls,
                 2 * 2 * B * H_kv * room * D, 4 * B * H * room * D)


def decode_benches() -> Iterator[Bench]: yield from (decode_bench(*size) for size in ((1, 65536), (8, 16384), (64, 4096)))


def rms_benches(N: int, C: int) -> Iterator[Bench]:
    from fundamentallm.kernels.norm import rms_norm

    size = 2 * N * C  # bytes of one (N, C) tensor
    def plain(x: Tensor, w: Tensor) -> Tensor: return F.rms_norm(x, (C,), w, 1e-6)
    def plain_added(x: Tensor, r: Tensor, w: Tensor) -> Any: return F.rms_norm(x + r, (C,), w, 1e-6), x + r
    def theirs() -> Fn: f = liger("ops.rms_norm", "LigerRMSNormFunction"); return lambda x, w: f.apply(x, w, 1e-6)
    impls: dict[str, Callable[[], Fn]] = {"ours": lambda: partial(rms_norm, eps=1e-6, impl="triton"), "torch": lambda: plain, "compile": lambda: compiled(plain), "liger": theirs}
    yield Bench("rms_norm forward", f"{N}x{C} bf16", lambda: (rand(N, C), rand(C)), impls, 2 * size)
    yield Bench("rms_norm backward", f"{N}x{C} bf16", lambda: (rand(N, C), rand(C)), impls, 3 * size, backward=True, leaves=(0, 1))
    added: dict[str, Callable[[], Fn]] = {"ours": lambda: lambda x, r, w: rms_norm(x, w, 1e-6, residual=r, impl="triton"), "torch": lambda: plain_added, "compile": lambda: compiled(plain_added)}
    yield Bench("rms_norm + residual forward", f"{N}x{C} bf16", lambda: (rand(N, C), rand(N, C), rand(C)), added, 4 * size)


def layer_benches(N: int, C: int) -> Iterator[Bench]:
    from fundamentallm.kernels.norm import layer_norm

    size = 2 * N * C
    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor: return F.layer_norm(x, (C,), w, b)
    def theirs() -> Fn: f = liger("ops.layer_norm", "LigerLayerNormFunction"); return lambda x, w, b: f.apply(x, w, b, 1e-5)
    impls: dict[str, Callable[[], Fn]] = {"ours": lambda: partial(layer_norm, eps=1e-5, impl="triton"), "torch": lambda: plain, "compile": lambda: compiled(plain), "liger": theirs}
    yield Bench("layer_norm forward", f"{N}x{C} bf16", lambda: (rand(N, C), rand(C), rand(C)), impls, 2 * size)
    yield Bench("layer_norm backward", f"{N}x{C} bf16", lambda: (rand(N, C), rand(C), rand(C)), impls, 3 * size, backward=True, leaves=(0, 1, 2))


def norm_benches() -> Iterator[Bench]:
    for C in (4096, 8192, 16384): yield from rms_benches(2**27 // C, C)
    for C in (4096, 16384): yield from layer_benches(2**27 // C, C)


def rope_benches() -> Iterator[Bench]:
    from fundamentallm.kernels.rope import rope, rope_reference

    B, T, H, H_kv, D = 4, 8192, 32, 8, 128
    angle = torch.rand(T, D // 2, device="cuda") * 6
    cos, sin = angle.cos(), angle.sin()
    def make() -> tuple[Tensor, ...]: return rand(B, T, H, D).transpose(1, 2), rand(B, T, H_kv, D).transpose(1, 2)
    size = 2 * 2 * B * T * D * (H + H_kv)
    for style in ("half", "pairs"):
        impls: dict[str, Callable[[], Fn]] = {
            "ours": lambda s=style: lambda q, k: rope(q, k, cos, sin, style=s, impl="triton"),
            "torch": lambda s=style: lambda q, k: rope_reference(q, k, cos, sin, style=s), "compile": lambda s=style: compiled(lambda q, k: rope_reference(q, k, cos, sin, style=s))}
        for back in (False, True):
            yield Bench(f"rope {style} {'backward' if back else 'forward'}", f"B{B} H{H}/{H_kv} T{T} D{D} bf16", make, impls, size, backward=back, leaves=(0, 1) if back else ())


def glu_benches() -> Iterator[Bench]:
    from fundamentallm.kernels.glu import glu

    N, W = 8192, 14336
    def plain(act: Fn) -> Fn:
        def f(x: Tensor) -> Tensor: g, u = x.chunk(2, -1); return act(g) * u
        return f
    for name, act in (("silu", F.silu), ("gelu_tanh", partial(F.gelu, approximate="tanh"))):
        impls: dict[str, Callable[[], Fn]] = {"ours": lambda n=name: partial(glu, activation=n, impl="triton"), "torch": lambda a=act: plain(a), "compile": lambda a=act: compiled(plain(a))}
        yield Bench(f"glu {name} forward", f"{N}x2x{W} bf16", lambda: (rand(N, 2 * W),), impls, 2 * N * W * 3)
        yield Bench(f"glu {name} backward", f"{N}x2x{W} bf16", lambda: (rand(N, 2 * W),), impls, 2 * N * W * 5, backward=True, leaves=(0,))


def loss_benches() -> Iterator[Bench]:
    from fundamentallm.kernels.loss import linear_cross_entropy

    N, C, V = 8192, 4096, 131072
    def plain(x: Tensor, w: Tensor, t: Tensor) -> Tensor: return F.cross_entropy((x @ w.T).float(), t)
    def make() -> tuple[Tensor, ...]: return rand(N, C), rand(V, C, std=C**-0.5), torch.randint(V, (N,), device="cuda")
    impls: dict[str, Callable[[], Fn]] = {
        "ours": lambda: partial(linear_cross_entropy, impl="triton"), "torch": lambda: plain, "compile": lambda: compiled(plain),
        "torch linear_cross_entropy": lambda: F.linear_cross_entropy,
        "liger": lambda: (lambda f: lambda x, w, t: f.apply(x, w, t)[0])(liger("ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"))}
    yield Bench("linear + cross-entropy, forward and backward", f"{N} tokens, {C} wide, {V} words, bf16", make, impls, 2 * 2 * (N * C + V * C), 6 * N * C * V, True, (0, 1))


# ---- how it is measured ----

def ceilings() -> Machine:
    "What this GPU can do at most, measured now: a large copy, a large bf16 product of random matrices."
    a = [torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda") for _ in range(2)]
    copy = 2 * a[0].numel() / gpu_seconds(lambda x, y: y.copy_(x), [(a[0], a[1])], 20)
    del a
    sets = [(rand(8192, 8192), rand(8192, 8192)) for _ in range(2)]
    return Machine(torch.cuda.get_device_name(), copy, 2 * 8192**3 / gpu_seconds(torch.mm, sets, 20))


def timed(b: Bench, fn: Fn) -> tuple[float, int]:
    "Median seconds of one implementation, and the peak of memory it took beyond its arguments."
    size = sum(t.numel() * t.element_size() for t in b.make())
    n = max(1, min(4, math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / size)))
    sets = []
    both = "forward and backward" in b.kernel
    for _ in range(n):
        args = b.make()
        leaves = [args[i].detach().requires_grad_() for i in b.leaves]
        for i, t in zip(b.leaves, leaves): args = (*args[:i], t, *args[i + 1:])
        sets.append((args, leaves))
    def whole(args: tuple[Any, ...], leaves: list[Tensor]) -> Any: return torch.autograd.grad(fn(*args), leaves)
    def forward(args: tuple[Any, ...], leaves: list[Tensor]) -> Any:
        with torch.no_grad(): return fn(*args)
    def back(outs: list[Tensor], leaves: list[Tensor], up: list[Tensor]) -> Any: return torch.autograd.grad(outs, leaves, up, retain_graph=True)
    calls: list[tuple[Any, ...]] = sets
    run: Fn = whole if both else forward
    if b.backward and not both:
        outs = [(lambda o: [o] if isinstance(o, Tensor) else list(o))(fn(*args)) for args, _ in sets]
        calls, run = [(o, leaves, [torch.randn_like(t) for t in o]) for o, (_, leaves) in zip(outs, sets)], back
    run(*calls[0]); torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
    run(*calls[0]); torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return gpu_seconds(run, calls, 30), peak


def measure(b: Bench, top: Machine) -> Iterator[dict[str, Any]]:
    "A row for each implementation: seconds, fraction of what the machine's ceilings allow, peak memory; or why it could not run."
    least, bound = floor(b.bytes, b.flops, top)
    for name, make in b.impls.items():
        row: dict[str, Any] = {"kernel": b.kernel, "shape": b.shape, "impl": name, "bytes": b.bytes, "flops": b.flops, "bound": bound}
        try:
            seconds, peak = timed(b, make())
            row |= {"seconds": seconds, "fraction_of_ceiling": least / seconds, "tflops": b.flops / seconds / 1e12, "tb_per_s": b.bytes / seconds / 1e12, "peak_bytes": peak}
            print(f"{b.kernel:28} {b.shape:42} {name:26} {seconds * 1e3:8.3f} ms  {least / seconds:6.1%} of the {bound} ceiling", flush=True)
        except Exception as e:  # a peer that is not installed or has no kernel for this: reported, not fatal
            row["error"] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            print(f"{b.kernel:28} {b.shape:42} {name:26} {row['error'][:90]}", flush=True)
        torch.cuda.empty_cache()
        yield row


def checks() -> list[dict[str, Any]]:
    "tests/kernel_checks.py, each family in each precision in a process of its own: most of the time goes into compiling, which then runs on all cores."
    families = ("flash", "loss", "norm", "glu", "decode", "rope")
    with tempfile.TemporaryDirectory() as d, ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        def one(job: tuple[str, str]) -> list[dict[str, Any]]:
            family, dtype = job
            file = Path(d) / f"{family}-{dtype}.json"
            done = subprocess.run([sys.executable, str(ROOT / "tests" / "kernel_checks.py"), family, "--dtype", dtype, "--quiet", "--json", str(file)],
                                  env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
            print(done.stdout.strip() or done.stderr.strip()[-500:], flush=True)
            rows: list[dict[str, Any]] = json.loads(file.read_text() or "[]") if file.exists() else []
            return rows or [{"label": family, "dtype": dtype, "errors": {}, "failed": [f"the process ended with {done.returncode}"]}]
        jobs = [(family, dtype) for family in families for dtype in ("bfloat16", "float16", "float32")]
        return [row for rows in pool.map(one, jobs) for row in rows]


def losers(rows: list[dict[str, Any]]) -> list[str]:
    "The kernels that lose to torch.compile: `auto` must not pick them."
    best = {(r["kernel"], r["shape"], r["impl"]): r["seconds"] for r in rows if "seconds" in r}
    return [f"{k}, {s}: {best[k, s, 'ours'] / t:.2f} times as long" for (k, s, i), t in best.items() if i == "compile" and best.get((k, s, "ours"), 0) > t]


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--out", type=Path, default=ROOT / "nbs" / "results", help="folder of the JSON")
    ap.add_argument("--only", choices=["tests", "benchmarks"], help="run one half")
    ap.add_argument("--minutes", type=float, default=7.5, help="begin no benchmark after this many minutes; what was left out is said")
    a = ap.parse_args()
    if not torch.cuda.is_available():
        print("Error: no GPU here (torch.cuda.is_available() is False). Run make gpu on a machine with a GPU and a CUDA or ROCm build of torch; "
              "without one, make test runs the same checks in Triton's interpreter", file=sys.stderr)
        return 1
    start, rows, left = time.time(), [], []
    tests = checks() if a.only != "benchmarks" else []
    failed = [t for t in tests if t["failed"]]
    print(f"{len(tests) - len(failed)} passed, {len(failed)} failed in {time.time() - start:.0f} s")
    top = ceilings()
    print(f"{top.name}: copy {top.copy / 1e12:.2f} TB/s, bf16 matmul {top.matmul / 1e12:.0f} TFLOP/s")
    if a.only != "tests":
        for b in (b for f in (norm_benches, attention_benches, loss_benches, glu_benches, rope_benches, decode_benches) for b in f()):
            if time.time() - start > 60 * a.minutes: left.append(f"{b.kernel} {b.shape}")
            else: rows += measure(b, top)
    for line in losers(rows): print("loses to torch.compile:", line)
    if left: print(f"not measured for want of time ({a.minutes} minutes): {', '.join(left)}")
    result = {"device": top.name, "ceilings": asdict(top), "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
              "date": date.today().isoformat(), "tests": tests, "benchmarks": rows, "not_measured": left, "loses_to_compile": losers(rows)}
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / f"gpu-{top.name.replace(' ', '-').lower()}-{date.today().isoformat()}.json"
    with atomic_file(path) as f: json.dump(result, f, indent=1)
    print(f"wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path} after {time.time() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
