"""Every kernel against PyTorch in float64, forward and all gradients, on random shapes.

tests/test_kernels.py runs it under Triton's interpreter, `make gpu` natively on a GPU at real sizes; by hand:
`TRITON_INTERPRET=1 python tests/kernel_checks.py [flash|decode|norm|rope|glu|loss ...]`. It needs torch, triton, numpy and this package only."""
from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fundamentallm.kernels.flash import flash_attention, flash_decode
from fundamentallm.kernels.glu import geglu, glu, swiglu
from fundamentallm.kernels.gpu import INTERPRETED, compare
from fundamentallm.kernels.loss import linear_cross_entropy
from fundamentallm.kernels.norm import layer_norm, rms_norm
from fundamentallm.kernels.rope import rope

Fn = Callable[..., Any]


class Check(NamedTuple):
    "One comparison: our kernel, PyTorch's own way to the same numbers, and what both are given."
    label: str
    ours: Fn
    oracle: Fn
    inputs: dict[str, Tensor]
    grads: bool | list[str] = True


class Draw:
    "Random sizes and tensors: small and odd under the interpreter, real on a GPU."
    def __init__(self, seed: int, dtype: torch.dtype, device: str, big: bool) -> None:
        self.r, self.g, self.dtype, self.device, self.big = random.Random(seed), torch.Generator().manual_seed(seed), dtype, device, big

    def size(self, small: tuple[int, ...], big: tuple[int, ...]) -> int: return self.r.choice(big if self.big else small)

    def tensor(self, *shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.g) * std).to(self.device, self.dtype)

    def layout(self, x: Tensor) -> Tensor:
        "The same shape in another memory order: as it is, two axes swapped in memory, every second row, or one row for all (stride zero)."
        kind = self.r.choice(["plain", "swapped", "gaps", "expanded"])
        if kind == "swapped" and x.ndim > 2: return x.transpose(-3, -2).contiguous().transpose(-3, -2)
        if kind == "gaps": return torch.stack((x, x), -2).flatten(-3, -2)[..., ::2, :]
        if kind == "expanded": return x[:1].expand_as(x)
        return x


# ---- attention ----

def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, slopes: Tensor | None = None,
                    documents: Tensor | None = None, scale: float | None = None) -> Tensor:
    "All scores at once, every rule as a mask, by PyTorch's own attention: what the kernel must equal."
    T_q, T_k, n = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    i, j = torch.arange(T_k - T_q, T_k, device=q.device)[:, None], torch.arange(T_k, device=q.device)
    ok = torch.ones(1, 1, T_q, T_k, dtype=torch.bool, device=q.device)
    if causal: ok = ok & (j <= i)
    if window is not None: ok = ok & ((i - j).abs() < window)
    if documents is not None: ok = ok & (documents[:, None, :, None] == documents[:, None, None, :])
    bias = torch.zeros(1, 1, 1, 1, dtype=q.dtype, device=q.device)
    if slopes is not None: bias = -slopes.to(q.dtype)[None, :, None, None] * (i - j).abs()
    mask = bias.expand(*ok.shape[:1], max(bias.shape[1], 1), T_q, T_k).masked_fill(~ok, -torch.inf)
    return F.scaled_dot_product_attention(q, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1), mask, scale=scale)


def document_ids(d: Draw, B: int, T: int) -> Tensor:
    "Ids of packed documents of random lengths, one of them perhaps a single token."
    starts = torch.rand(B, T, generator=d.g) < 4 / T
    return starts.cumsum(1).to(d.device)


def flash_checks(d: Draw) -> Iterator[Check]:
    for ratio in (1, 2, 4, 8):
        for feature in ("full", "causal", "window", "documents", "alibi", "all"):
            H, B = d.size((8,), (8, 16)), d.size((1, 1, 2), (1, 2))
            T_q = d.size((1, 7, 16, 37, 53, 71), (1024, 1031, 2048))
            same = feature in ("documents", "all")
            T_k = T_q if same else T_q + d.size((0, 0, 3, 29), (0, 0, 517))
            D = d.size((8, 13, 16, 32, 40, 64, 80), (64, 128, 96) if d.dtype == torch.float32 else (64, 128, 96, 256))  # fp32 on a GPU: 128 at most
            rules: dict[str, Any] = {"causal": feature in ("causal", "all") or d.r.random() < 0.3}
            if feature in ("window", "all"): rules["window"] = d.size((1, 5, 33), (100, 512))
            if feature in ("documents", "all"): rules["documents"] = document_ids(d, B, T_q)
            if feature in ("alibi", "all"): rules["slopes"] = torch.rand(H, generator=d.g).to(d.device)
            if d.r.random() < 0.3: rules["scale"] = 0.3 * D**-0.5
            q, k, v = (d.layout(d.tensor(B, h, t, D)) for h, t in ((H, T_q), (H // ratio, T_k), (H // ratio, T_k)))
            yield Check(f"flash {feature} B{B} H{H}/{H // ratio} T{T_q}/{T_k} D{D} causal={rules['causal']}",
                        partial(flash_attention, impl="triton", **rules), partial(dense_attention, **rules), {"q": q, "k": k, "v": v})


def dense_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **rules: Any) -> Tensor:
    "Row by row: the queries are the last positions of that row's valid keys."
    return torch.cat([dense_attention(q[b:b + 1], k[b:b + 1, :, :n], v[b:b + 1, :, :n], causal=True, **rules) for b, n in enumerate(lengths.tolist())])


def decode_checks(d: Draw) -> Iterator[Check]:
    for ratio in (1, 2, 4, 8):
        B, H, D, T_q = d.size((1, 3), (4, 16)), 8, d.size((8, 24, 64), (64, 128)), d.r.choice([1, 1, 2, 5])
        room = d.size((19, 130, 300), (1000, 8192))
        lengths = torch.randint(T_q, room + 1, (B,), generator=d.g).to(d.device)
        rules: dict[str, Any] = {}
        if d.r.random() < 0.4: rules["window"] = d.size((3, 50), (512,))
        if d.r.random() < 0.4: rules["slopes"] = torch.rand(H, generator=d.g).to(d.device)
        splits = d.r.choice([None, 1, 3, 8])
        inputs = {"q": d.tensor(B, H, T_q, D), "k": d.tensor(B, H // ratio, room, D), "v": d.tensor(B, H // ratio, room, D)}
        yield Check(f"decode B{B} H{H}/{H // ratio} T{T_q}/{room} D{D} splits={splits}", partial(flash_decode, lengths=lengths, splits=splits, impl="triton", **rules),
                    partial(dense_decode, lengths=lengths, **rules), inputs, False)


# ---- rows ----

def plain_norm(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-5) -> Any:
    "PyTorch's own norms, after the addition if there is one."
    s = x if residual is None else x + residual
    y = F.rms_norm(s, weight.shape, weight, eps) if kind == "rms" else F.layer_norm(s, weight.shape, weight, bias, eps)
    return y if residual is None else (y, s)


def norm_checks(d: Draw) -> Iterator[Check]:
    for kind in ("rms", "layer"):
        for added in (False, True):
            for _ in range(3):
                C = d.size((1, 2, 7, 64, 129, 1000), (1024, 4096, 5000, 8192, 16384))
                shape = (d.size((1, 2, 5), (4,)), d.size((1, 3, 17), (512, 1023)), C)
                inputs = {"x": d.layout(d.tensor(*shape)), "weight": d.tensor(C)}
                if kind == "layer" and d.r.random() < 0.7: inputs["bias"] = d.tensor(C)
                if added: inputs["residual"] = d.layout(d.tensor(*shape))
                if kind == "rms": ours: Fn = partial(rms_norm, eps=1e-5, impl="triton")
                else: ours = partial(layer_norm, eps=1e-5, impl="triton") if "bias" in inputs else partial(layer_norm, bias=None, eps=1e-5, impl="triton")
                yield Check(f"{kind}_norm {shape} residual={added} bias={'bias' in inputs}", ours, partial(plain_norm, kind), inputs)


def complex_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, style: str) -> tuple[Tensor, Tensor]:
    "Rotation as multiplication by a complex number of length one."
    def turn(x: Tensor) -> Tensor:
        D, c, s = x.shape[-1], cos.to(x.dtype), sin.to(x.dtype)
        if c.ndim == 3: c, s = c[:, None], s[:, None]
        a, b = (x[..., :D // 2], x[..., D // 2:]) if style == "half" else (x[..., ::2], x[..., 1::2])
        re, im = a * c - b * s, a * s + b * c
        return torch.cat((re, im), -1) if style == "half" else torch.stack((re, im), -1).flatten(-2)
    return turn(q), turn(k)


def rope_checks(d: Draw) -> Iterator[Check]:
    for style in ("half", "pairs"):
        for ratio in (1, 2, 4, 8):
            B, H, T, D = d.size((1, 2), (2, 4)), 8, d.size((1, 5, 17, 64), (1024, 2047)), d.size((2, 6, 16, 64, 80), (64, 128, 80))
            angle = torch.rand(*([B] if d.r.random() < 0.4 else []), T, D // 2, generator=d.g) * 6
            inputs = {"q": d.layout(d.tensor(B, H, T, D)), "k": d.layout(d.tensor(B, H // ratio, T, D)), "cos": angle.cos().to(d.device), "sin": angle.sin().to(d.device)}
            yield Check(f"rope {style} B{B} H{H}/{H // ratio} T{T} D{D} tables {tuple(angle.shape)}", partial(rope, style=style, impl="triton"), partial(complex_rope, style=style), inputs, ["q", "k"])


ACTIVATIONS: dict[str, Fn] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def glu_checks(d: Draw) -> Iterator[Check]:
    for name, act in ACTIVATIONS.items():
        for packed in (True, False):
            F_, N = d.size((1, 3, 64, 127, 1030), (2752, 11008, 14336)), d.size((1, 5, 33), (2048, 1999))
            if packed:
                inputs = {"gate_up": d.layout(d.tensor(2, N, 2 * F_, std=3))}
                def oracle(gate_up: Tensor, act: Fn = act) -> Tensor: g, u = gate_up.chunk(2, -1); return act(g) * u
                ours: Fn = partial(glu, activation=name, impl="triton")
            else:
                inputs = {"gate": d.layout(d.tensor(2, N, F_, std=3)), "up": d.layout(d.tensor(2, N, F_))}
                def oracle(gate: Tensor, up: Tensor, act: Fn = act) -> Tensor: return act(gate) * up
                ours = partial(swiglu, impl="triton") if name == "silu" else partial(geglu, approximate="tanh" if name == "gelu_tanh" else "none", impl="triton")
            yield Check(f"glu {name} packed={packed} N{2 * N} F{F_}", ours, oracle, inputs)


# ---- loss ----

def plain_loss(x: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None, z_loss: float, label_smoothing: float, reduction: str) -> Tensor:
    "All logits at once, by PyTorch's own cross-entropy."
    logits = F.linear(x, weight)
    logits = logits if x.dtype == torch.float64 else logits.float()
    if softcap is not None: logits = softcap * torch.tanh(logits / softcap)
    rows = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing, reduction="none").view(targets.shape)
    rows = rows + z_loss * torch.where(targets == -100, 0, logits.logsumexp(-1) ** 2)
    return rows if reduction == "none" else rows.sum() / (1 if reduction == "sum" else (targets != -100).sum())


def loss_checks(d: Draw) -> Iterator[Check]:
    for reduction in ("mean", "sum", "none"):
        for extra in ("plain", "smoothing", "z", "softcap", "all"):
            C, V, shape = d.size((1, 8, 33), (512, 1024)), d.size((2, 11, 130, 1000), (32000, 50257)), (d.size((1, 2), (2,)), d.size((1, 3, 19), (512, 511)))
            kw: dict[str, Any] = {"softcap": 5.0 if extra in ("softcap", "all") else None, "z_loss": 0.01 if extra in ("z", "all") else 0.0,
                                  "label_smoothing": 0.1 if extra in ("smoothing", "all") else 0.0, "reduction": reduction}
            targets = torch.randint(V, shape, generator=d.g)
            if targets.numel() > 1: targets[torch.rand(shape, generator=d.g) < 0.2] = -100; targets.view(-1)[0] = 0  # at least one that counts
            inputs = {"x": d.layout(d.tensor(*shape, C)), "weight": d.tensor(V, C, std=C**-0.5), "targets": targets.to(d.device)}
            chunk = d.r.choice([None, -(-V // 3), 64]) if not d.big else d.r.choice([None, 4096])
            yield Check(f"loss {reduction} {extra} N{targets.numel()} V{V} C{C} chunk={chunk}", partial(linear_cross_entropy, chunk=chunk, impl="triton", **kw), partial(plain_loss, **kw), inputs)


FAMILIES: dict[str, Callable[[Draw], Iterator[Check]]] = {
    "flash": flash_checks, "decode": decode_checks, "norm": norm_checks, "rope": rope_checks, "glu": glu_checks, "loss": loss_checks}


# ---- judgement ----

def limits(c: Check, dtype: torch.dtype) -> dict[str, float]:
    """Twice (gradients: three times) the error of PyTorch's own result in that precision, which is the rounding floor; and no less than 1e-5 in fp32, one unit in 16 bits.

    Where a gradient nearly cancels (a row of one number has no direction), PyTorch's own fp32 is no nearer to float64 than that."""
    own = compare(c.oracle, c.oracle, c.inputs, grads=c.grads)
    least = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    return {n: max(e * (3 if n.startswith("d") else 2), least) for n, e in own.items()}


def run(families: list[str], dtype: torch.dtype, device: str, big: bool, seeds: int, quiet: bool = False) -> list[dict[str, Any]]:
    "All checks of some families: a row for each, with its errors and what it failed."
    rows = []
    for family in families:
        for seed in range(seeds):
            for c in FAMILIES[family](Draw(seed, dtype, device, big)):
                errors, bad = {}, []
                try:
                    errors, limit = compare(c.ours, c.oracle, c.inputs, grads=c.grads), limits(c, dtype)
                    bad = [f"{n}: {e:.2e} > {limit[n]:.2e}" for n, e in errors.items() if not e <= limit[n]]
                except Exception as e: bad = [f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"]
                rows.append({"label": c.label, "dtype": str(dtype).removeprefix("torch."), "errors": errors, "failed": bad})
                if bad or not quiet: print(f"{'FAILED' if bad else 'ok    '} {c.label} {'; '.join(bad) or f'worst {max(errors.values()):.1e}'}", flush=True)
    return rows


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)}")
    ap.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    ap.add_argument("--seeds", type=int, default=1, help="random draws of each family")
    ap.add_argument("--quiet", action="store_true", help="print failures only")
    ap.add_argument("--json", type=argparse.FileType("w"), help="write a row for each check to this file")
    a = ap.parse_args()
    gpu = torch.cuda.is_available() and not INTERPRETED
    if not gpu and not INTERPRETED: print("Error: no GPU here: set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"); return 1
    start = time.time()
    rows = run(a.families, getattr(torch, a.dtype), "cuda" if gpu else "cpu", gpu, a.seeds, a.quiet)
    failed = sum(bool(r["failed"]) for r in rows)
    if a.json: json.dump(rows, a.json)
    print(f"{len(rows) - failed} passed, {failed} failed in {time.time() - start:.0f} s: {', '.join(a.families)} in {a.dtype}, {'interpreted' if INTERPRETED else torch.cuda.get_device_name()}")
    return 1 if failed or not rows else 0


if __name__ == "__main__": sys.exit(main())
