"""Training in several real processes, started by torchrun on this machine: gradients, elastic resume, a killed process, sharded checkpoints.

The file is its own worker: torchrun runs it as a script, `main` below does what the arguments say."""
from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import environment
from kill_cases import MOMENTS, strike

STEPS, STOP = 8, 4
SETTINGS = ["model.dim=12", "model.n_heads=3", "model.n_layers=2", "model.context=8", "model.dropout=0.0", "train.precision=fp32", "train.batch_size=6",
            f"train.steps={STEPS}", "train.eval_every=4", "train.checkpoint_every=4", "train.sample_every=0", "train.keep=5", "train.threads=1", "train.device=cpu",
            "train.eval_tokens=64", "optim.warmup=2", "optim.lr=0.01"]


# ---- what a process does --------------------------------------------------------------------------------------------


def settings(text: str, *more: str) -> Any:
    "A tiny run over a text."
    from fundamentallm.config import load_config
    return load_config("tiny", [*SETTINGS, f"data.path={text}", *more])


def fit(group: Any, text: str, run: str, resume: bool = False, stop: int = 0, kill: int = 0, hit: tuple[str, int, int, int] | None = None) -> None:
    "`train`, with a note of every row that this process has read: seen-RANK.jsonl. It can be told to stop, or to die, after a step, or at a moment (moment, step, rank, nth)."
    import fundamentallm.trainer as trainer

    class Seen(trainer.Batches):  # type: ignore[name-defined,misc]
        def at(self, step: int) -> Any:
            with open(f"{run}.seen-{group.rank}.jsonl", "a") as f: f.write(json.dumps([step, self.positions(*divmod(step, self.steps_per_epoch))[:, 0].tolist()]) + "\n")
            return super().at(step)

    if hit and group.rank == hit[2]: strike(hit[0], hit[1], signal.SIGKILL, hit[3])
    real, update = trainer.Batches, trainer.Trainer.update

    def count(t: Any) -> None:
        update(t)
        if t.step == stop: t.stopping = True
        if t.step == kill and t.group.rank == t.group.world - 1 and not os.path.exists(f"{run}.killed"):
            Path(f"{run}.killed").write_text(str(t.step)); os.kill(os.getpid(), signal.SIGKILL)
    trainer.Batches, trainer.Trainer.update = Seen, count
    resume = resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun has started us again
    try: trainer.train(settings(text), run, group=group, progress=False, resume=resume)
    except trainer.Interrupted: pass
    finally: trainer.Batches, trainer.Trainer.update = real, update


def gradient(group: Any, text: str, out: str) -> None:
    "The gradient of an uneven batch with targets that do not count, in two micro-batches; process 0 writes it."
    import torch

    from fundamentallm.core import seed_everything
    from fundamentallm.model import LanguageModel
    from fundamentallm.trainer import Stepper
    seed_everything(3 + group.rank)  # process 0's weights must win
    config = settings(text, "train.accumulate=2", "train.batch_size=5", "model.vocab_size=17")
    model = LanguageModel(config.model)
    if group.rank == 0: torch.manual_seed(3); model = LanguageModel(config.model)
    stepper = Stepper(model, Uneven(group.rank, group.world), config, group)
    loss, tokens = stepper.gradients(0)
    norm = group.clip(stepper.params, 0.0)
    grads = {n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad) for n, p in model.named_parameters()}
    if group.rank == 0: save(out, {**grads, "loss": loss, "tokens": torch.tensor(tokens), "norm": norm})


class Uneven:
    "Five rows of 8 tokens, some of whose targets are left out, shared by processes; both micro-batches differ in what counts."
    def __init__(self, rank: int, world: int) -> None: self.rows = slice(rank*5//world, (rank + 1)*5//world)

    def at(self, step: int) -> Any:
        import torch
        g = torch.Generator().manual_seed(step)
        x, y, keep = torch.randint(17, (5, 8), generator=g), torch.randint(17, (5, 8), generator=g), torch.rand(5, 8, generator=g) < (0.9, 0.3)[step % 2]
        return x[self.rows], torch.where(keep, y, -100)[self.rows]


def save(path: str, tensors: dict[str, Any]) -> None:
    "A safetensors file."
    from safetensors.torch import save_file
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path)


def shards(group: Any, text: str, dir: str, out: str, read: bool) -> None:
    "Half a run and a sharded checkpoint, or the other half after reading it; process 0 writes the weights and losses at the end."
    import torch

    from fundamentallm.core import seed_everything
    from fundamentallm.dataset import Batches
    from fundamentallm.distributed import load_sharded, save_sharded
    from fundamentallm.model import LanguageModel
    from fundamentallm.trainer import Stepper
    config = settings(text, "model.vocab_size=17")
    seed_everything(8 if read else 9)
    model = LanguageModel(config.model)
    tokens = np.random.default_rng(0).integers(0, 17, 2000).astype(np.uint16)
    s, first = Stepper(model, Batches(tokens, 8, 6, 0, group.rank, group.world), config, group), 0
    if read:
        state = load_sharded(dir, model, s.optimizer, group)
        first = state["step"]
        assert state["plain"] == [1, "two", None] and state["tensor"].tolist() == [3, 4]
    losses = [s.update(k)[0] for k in range(first, STOP)]
    if not read: save_sharded(dir, model, s.optimizer, {"step": STOP, "plain": [1, "two", None], "tensor": torch.tensor([3, 4])}, group)
    losses = [s.update(k)[0] for k in range(STOP, STEPS)]
    weights, memory = group.state(model, s.optimizer)
    if group.rank == 0: save(out, {**weights, **memory, "losses": torch.stack(losses)})


def again(group: Any, text: str, out: str) -> None:
    "Half a run, then the other half twice: at once, and by a fresh model, optimizer and wrapping; process 0 writes whether the bits agree."
    import torch

    from fundamentallm.core import seed_everything
    from fundamentallm.dataset import Batches
    from fundamentallm.model import LanguageModel
    from fundamentallm.trainer import Stepper
    config = settings(text, "model.vocab_size=17")
    tokens = np.random.default_rng(0).integers(0, 17, 2000).astype(np.uint16)

    def stepper() -> Any:
        seed_everything(5)
        return Stepper(LanguageModel(config.model), Batches(tokens, 8, 6, 0, group.rank, group.world), config, group)
    a = stepper()
    for k in range(STOP): a.update(k)
    weights, memory = ({k: v.clone() for k, v in d.items()} for d in group.state(a.model, a.optimizer))
    for k in range(STOP, STEPS): a.update(k)
    b = stepper()
    group.load(b.model, b.optimizer, weights, memory)
    for k in range(STOP, STEPS): b.update(k)
    one, two = a.model.state_dict(), b.model.state_dict()
    if group.rank == 0: save(out, {"same": torch.tensor(all(torch.equal(one[k], two[k]) for k in one))})


def main(jobs: list[dict[str, Any]]) -> None:
    "One after the other."
    import faulthandler

    from fundamentallm.distributed import launch_group
    faulthandler.enable()
    faulthandler.dump_traceback_later(140, exit=True)  # nothing may hang
    groups: dict[str, Any] = {}
    for job in jobs:
        do, kind = job.pop("do"), job.pop("kind", "ddp")
        group = groups[kind] = groups.get(kind) or launch_group(kind, timeout=60) if not groups else join(kind)
        {"fit": fit, "gradient": gradient, "shards": shards, "again": again}[do](group, **job)
        group.barrier()


def join(kind: str) -> Any:
    "Another kind of group of the same processes."
    from fundamentallm.distributed import DDPGroup, FSDPGroup
    return DDPGroup() if kind == "ddp" else FSDPGroup()


# ---- what is tested -------------------------------------------------------------------------------------------------


def torchrun(n: int, *jobs: dict[str, Any], options: tuple[str, ...] = (), code: int = 0) -> str:
    "Run the jobs in n processes; what they printed."
    words = [json.dumps(job) for job in jobs]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *options, __file__, *words],
                          capture_output=True, text=True, timeout=150, env=environment())
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def read(path: Path) -> dict[str, Any]:
    "A safetensors file."
    from safetensors.torch import load_file
    return dict(load_file(path))


def final(run: Path, step: int = STEPS) -> dict[str, Any]:
    "Weights and optimizer state of the checkpoint of a step."
    dir = run/"checkpoints"/f"step-{step:06d}"
    state = {f"state:{k}": v for k, v in read(dir/"training_state.safetensors").items() if "optimizer" in k}
    assert state
    return {**read(dir/"model.safetensors"), **state}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    "To the bit?"
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bool((a[k] == b[k]).all()) for k in a)


def gap(a: dict[str, Any], b: dict[str, Any]) -> float:
    "The largest difference, relative to the largest number of its tensor."
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()/b[k].double().abs().max().clamp(min=1e-12)) for k in a)


def losses(run: Path) -> list[tuple[int, float]]:
    "Step and loss, in the order of the log."
    records = [json.loads(line) for line in (run/"events.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def rows(run: Path) -> dict[int, list[int]]:
    "Step -> where its rows begin, of all processes, in their order."
    found: dict[int, dict[int, list[int]]] = {}
    for rank in range(8):
        path = Path(f"{run}.seen-{rank}.jsonl")
        for step, at in map(json.loads, path.read_text().splitlines()) if path.exists() else ():
            found.setdefault(step, {})[rank] = at
    return {step: [p for rank in sorted(by) for p in by[rank]] for step, by in found.items() if step < STEPS}


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A directory with: `one`, a run of one process; `two`, of two; `half`, of two, stopped in the middle; gradients; sharded checkpoints."
    from fundamentallm.trainer import Solo
    d, text = tmp_path_factory.mktemp("distributed"), str(corpus)
    fit(Solo(), text, str(d/"one"))
    gradient(Solo(), text, str(d/"gradient.one"))
    torchrun(2, {"do": "gradient", "text": text, "out": str(d/"gradient.ddp")}, {"do": "gradient", "kind": "fsdp", "text": text, "out": str(d/"gradient.fsdp")},
             {"do": "fit", "text": text, "run": str(d/"two")}, {"do": "fit", "text": text, "run": str(d/"half"), "stop": STOP},
             {"do": "shards", "kind": "fsdp", "text": text, "dir": str(d/"shards"), "out": str(d/"shards.two"), "read": False})
    return d


def resumed(base: Path, name: str) -> Path:
    "A copy of the half run, to go on with."
    shutil.copytree(base/"half", base/name, symlinks=True)
    return base/name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradient_is_the_token_weighted_mean(base: Path, kind: str) -> None:
    "Two and three rows, two micro-batches of which many targets do not count: the gradient of one process with all of them."
    one, two = read(base/"gradient.one"), read(base/f"gradient.{kind}")
    assert two["tokens"] == one["tokens"] < 2*5*8
    assert gap(two, one) < 2e-6


def test_two_processes_equal_one(base: Path) -> None:
    "The same rows in every step; losses, weights and optimizer state equal to rounding."
    one, two = losses(base/"one"), losses(base/"two")
    assert [s for s, _ in two] == [s for s, _ in one] == list(range(1, STEPS + 1))
    assert np.allclose([x for _, x in one], [x for _, x in two], rtol=1e-6, atol=0)
    assert rows(base/"one") == rows(base/"two") and len(rows(base/"one")) == STEPS and {len(v) for v in rows(base/"one").values()} == {6}
    assert gap(final(base/"two"), final(base/"one")) < 1e-4


def test_resume_on_two_is_bit_identical(base: Path, corpus: Path) -> None:
    "Stopped after four steps and resumed by two other processes; DDP and a sharded checkpoint under FSDP: the same bits as undisturbed."
    run, text = resumed(base, "two-again"), str(corpus)
    torchrun(2, {"do": "fit", "text": text, "run": str(run), "resume": True},
             {"do": "shards", "kind": "fsdp", "text": text, "dir": str(base/"shards"), "out": str(base/"shards.again"), "read": True})
    assert same(final(run), final(base/"two")) and losses(run) == losses(base/"two")
    assert same(read(base/"shards.again"), read(base/"shards.two"))


def test_resume_on_one_and_on_four(base: Path, corpus: Path) -> None:
    "Saved on two, continued on one and on four: the same rows, losses equal to rounding; and so with a sharded checkpoint. On four again: the same bits."
    from fundamentallm.trainer import Solo
    one, four, text = resumed(base, "on-one"), resumed(base, "on-four"), str(corpus)
    fit(Solo(), text, str(one), resume=True)
    shards(Solo(), text, str(base/"shards"), str(base/"shards.one"), read=True)
    torchrun(4, {"do": "fit", "text": text, "run": str(four), "resume": True}, {"do": "again", "text": text, "out": str(base/"again")},
             {"do": "shards", "kind": "fsdp", "text": text, "dir": str(base/"shards"), "out": str(base/"shards.four"), "read": True})
    assert read(base/"again")["same"]  # more than two addends: only if DDP's buckets are the same from the first step on
    for run in (one, four):
        assert all(rows(run)[step] == rows(base/"two")[step] for step in range(STOP, STEPS))
        assert losses(run)[:STOP] == losses(base/"two")[:STOP]
        assert np.allclose([x for _, x in losses(run)], [x for _, x in losses(base/"two")], rtol=1e-6, atol=0)
    for name in ("one", "four"):
        assert np.allclose(read(base/f"shards.{name}")["losses"], read(base/"shards.two")["losses"], rtol=1e-6, atol=0)
        assert gap(read(base/f"shards.{name}"), read(base/"shards.two")) < 1e-4


def test_a_killed_process(base: Path, corpus: Path) -> None:
    "SIGKILL for one of two in step 6: torchrun starts both again, they go on from step 4, and the end has the same bits."
    run = base/"killed"
    said = torchrun(2, {"do": "fit", "text": str(corpus), "run": str(run), "kill": 6}, options=("--max-restarts=1",))
    assert "Signal 9" in said or "SIGKILL" in said or "-9" in said, said
    assert Path(f"{run}.killed").read_text() == "6"
    assert same(final(run), final(base/"two")) and losses(run) == losses(base/"two")


def test_missing_process_is_named(corpus: Path) -> None:
    "One of two never comes: one line that says so, after the time that was given, not a hang."
    with __import__("socket").create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    env = environment(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = "from fundamentallm.distributed import launch_group\nfrom fundamentallm.core import FundamentaLLMError\ntry: launch_group(timeout=2)\nexcept FundamentaLLMError as e: print(e)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100)
    assert "process 0 of 2 has not met the others" in done.stdout and len(done.stdout.strip().splitlines()) == 1, done.stdout + done.stderr
    assert time.monotonic() - began < 60


def test_addresses_of_the_dead_are_not_called() -> None:
    "torchrun keeps its store when it starts processes again: whoever comes back first must wait for the others, not call where they were before."
    from torch.distributed import TCPStore
    code = "import time\nfrom fundamentallm.distributed import launch_group\n{}g = launch_group(timeout=60); print(g.any(g.rank == 1))"

    def start(rank: int, attempt: int, late: bool = False) -> subprocess.Popen[str]:
        env = environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True",
                          TORCHELASTIC_RESTART_COUNT=str(attempt))
        return subprocess.Popen([sys.executable, "-c", code.format("time.sleep(1)\n" if late else "")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in range(4):
        for process in [start(0, attempt), start(1, attempt, late=attempt > 0)]:
            said, _ = process.communicate(timeout=100)
            assert (process.returncode, said.strip().splitlines()[-1:]) == (0, ["True"]), said


def test_sharded_checkpoint_is_verified(base: Path, tmp_path: Path) -> None:
    "A bit, a missing shard, a shard too many, no manifest: each named; a planted pickle is never opened; a half-written one has no name."
    from fundamentallm.config import load_config
    from fundamentallm.core import CheckpointError
    from fundamentallm.distributed import load_sharded, save_sharded, verify_sharded
    from fundamentallm.model import LanguageModel
    from fundamentallm.optim import make_optimizer
    from fundamentallm.trainer import Solo
    good = base/"shards"
    assert not [p for p in good.iterdir() if p.suffix in (".pt", ".bin", ".pkl") or p.name == ".metadata"]
    names = sorted(p.name for p in good.iterdir())
    assert len([n for n in names if n.endswith(".safetensors")]) == 2, names

    def broken(change: Any) -> str:
        dir = tmp_path/"broken"
        shutil.rmtree(dir, ignore_errors=True); shutil.copytree(good, dir)
        change(dir)
        with pytest.raises(CheckpointError) as e: verify_sharded(dir)
        return str(e.value)

    def flip(path: Path) -> None: data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)
    shard = next(n for n in names if n.endswith(".safetensors"))
    assert shard in broken(lambda d: flip(d/shard)) and "state.json" in broken(lambda d: flip(d/"state.json"))
    assert shard in broken(lambda d: (d/shard).unlink()) and "missing" in broken(lambda d: (d/shard).unlink())
    assert "extra.safetensors" in broken(lambda d: shutil.copy(d/shard, d/"extra.safetensors"))
    assert "manifest.json" in broken(lambda d: (d/"manifest.json").unlink())

    class Evil:
        def __reduce__(self) -> Any: return os.system, (f"touch {tmp_path}/pwned",)
    dir = tmp_path/"planted"
    shutil.copytree(good, dir)
    for name in (".metadata", "__0_0.distcp", "pytorch_model.bin", "shard.pt"): (dir/name).write_bytes(pickle.dumps(Evil()))
    config = settings("x", "model.vocab_size=17")
    model = LanguageModel(config.model)
    optimizer = make_optimizer(model, "adamw")
    assert load_sharded(dir, model, optimizer, Solo())["step"] == STOP and not (tmp_path/"pwned").exists()
    other = LanguageModel(load_config("tiny", [*SETTINGS, "model.vocab_size=17", "model.n_layers=1"]).model)
    with pytest.raises(CheckpointError, match="not those of this model"): load_sharded(dir, other, make_optimizer(other, "adamw"), Solo())
    with pytest.raises(CheckpointError, match="exists already"): save_sharded(dir, model, optimizer, {}, Solo())
    real = os.fsync

    def full(fd: int) -> None: raise OSError(28, "No space left on device")
    os.fsync = full
    try:
        with pytest.raises(CheckpointError, match="was not written"): save_sharded(tmp_path/"full", model, optimizer, {}, Solo())
    finally: os.fsync = real
    assert not [p for p in tmp_path.iterdir() if "full" in p.name]
    save_sharded(dir, model, optimizer, {"step": 1}, Solo(), replace=True)
    verify_sharded(dir)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_random_kills(base: Path, corpus: Path, kind: str) -> None:
    "One of two processes, killed at each moment in a random step: resumed, the same bits as undisturbed. Only process 0 saves."
    rng, text, whole = random.Random(kind), str(corpus), base/f"whole-{kind}"
    torchrun(2, {"do": "fit", "kind": kind, "text": text, "run": str(whole)})
    for moment in MOMENTS:
        run = base/f"random-{kind}-{moment}"
        hit = (moment, rng.randint(1, STEPS - 1), 0 if moment == "saving" else rng.randrange(2), rng.randrange(8) if moment == "saving" else 0)
        torchrun(2, {"do": "fit", "kind": kind, "text": text, "run": str(run), "hit": hit}, code=1)
        torchrun(2, {"do": "fit", "kind": kind, "text": text, "run": str(run), "resume": True})
        assert same(final(run), final(whole)) and losses(run) == losses(whole), (kind, hit)


if __name__ == "__main__": main([json.loads(word) for word in sys.argv[1:]])
