"Preparing data in real processes: killed anywhere, out of disk, twice at once, workers that die, Ray; the result is always the same bytes."
from __future__ import annotations

import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills processes and looks at /proc")

RUN = """
import json, os, sys
from fundamentallm.core import FundamentaLLMError
from fundamentallm.prepare import prepare
def run(**more):
    try: done = prepare(**json.loads(sys.argv[1]), **more); print(json.dumps([done.blocks, done.kept, done.finished]))
    except FundamentaLLMError as e: print("Error:", e, file=sys.stderr); os._exit(1)
    except KeyboardInterrupt as e: print("Stopped:", e, file=sys.stderr); os._exit(130)
"""


def start(call: dict[str, Any], code: str = "run()", **options: Any) -> subprocess.Popen[str]:
    "`prepare(**call)` in a process of its own."
    env = environment(**options.pop("env", {}))
    return subprocess.Popen([sys.executable, "-c", RUN + code, json.dumps(call)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(call: dict[str, Any], code: str = "run()", **options: Any) -> tuple[int, int, bool]:
    "Run to the end: blocks there were, blocks that were done before, and whether all was."
    process = start(call, code, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    blocks, kept, finished = json.loads(out.splitlines()[-1])
    return blocks, kept, finished


def tree(dir: Path) -> dict[str, bytes]:
    "Every file below a directory."
    return {str(p.relative_to(dir)): p.read_bytes() for p in dir.rglob("*") if p.is_file()}


def journal(out: str | Path) -> Path:
    "Where the work in progress is."
    return Path(out).with_name(f".{Path(out).name}.partial") / "parts"


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    "Files of three kinds, some 600 kB of text, and how they are prepared: many small blocks, so that there is much to interrupt."
    dir, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = [line.split() for line in ("the king of a merry land went out to sea", "café naïve Ünïcode 漢字 🙂", "0 1 2 3 { } ; = if return")]
    def text(n: int) -> str: return "\n".join(" ".join(rng.choices(rng.choice(words), k=9)) for _ in range(n))
    (dir / "a.jsonl").write_text("".join(json.dumps({"text": text(rng.randint(1, 9))}) + "\n" for _ in range(1000)))
    (dir / "b.txt").write_text(text(6000))
    (dir / "c.txt.gz").write_bytes(gzip.compress(text(4000).encode()))
    return {"files": [str(dir / "*.jsonl"), str(dir / "*.txt*")], "block_bytes": 8000, "fractions": [0.6, 0.3, 0.1], "shard_tokens": 100_000, "workers": 1}


@pytest.fixture(scope="module")
def wanted(call: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    "What an uninterrupted run in one process makes."
    out = tmp_path_factory.mktemp("whole") / "out"
    blocks, kept, finished = finish({**call, "out": str(out)})
    files = tree(out)
    assert blocks > 60 and (kept, finished) == (0, False) and len(files) > 10, sorted(files)
    assert os.listdir(out.parent) == ["out"]
    return files


def assert_whole(out: Path, wanted: dict[str, bytes]) -> None:
    "Byte for byte the result of an uninterrupted run, and nothing beside it."
    assert tree(out) == wanted
    assert os.listdir(out.parent) == [out.name]


def marked(mark: str) -> list[int]:
    "Processes that carry a mark in their environment."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try: data, state = (p / "environ").read_bytes(), (p / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError: continue
        if f"MARK={mark}".encode() in data and state != "Z": found.append(int(p.name))
    return found


@pytest.mark.parametrize("workers,kills", [(1, 5), (2, 2), (3, 2)])
def test_killed_at_random_moments(workers: int, kills: int, call: dict[str, Any], wanted: dict[str, bytes], tmp_path: Path) -> None:
    "SIGKILL while it works, again and again; no worker outlives its parent; the work done is not done again; the result is the same."
    call = {**call, "out": str(tmp_path / "out"), "workers": workers}
    rng, parts, before = random.Random(workers), journal(call["out"]), 0
    for _ in range(kills):
        process, until = start(call, env={"MARK": f"prepare{os.getpid()}"}), before + rng.randint(1, 250_000)
        while process.poll() is None and not (parts.exists() and parts.stat().st_size >= until): time.sleep(0.001)
        process.kill()
        process.communicate()
        if not parts.exists(): break                     # it was quicker than the kill
        assert not (tmp_path / "out").exists() and parts.stat().st_size >= before
        before = parts.stat().st_size
    deadline = time.monotonic() + 20
    while (left := marked(f"prepare{os.getpid()}")) and time.monotonic() < deadline: time.sleep(0.05)
    assert not left
    blocks, kept, finished = finish(call)
    assert 0 < kept < blocks or finished
    assert_whole(tmp_path / "out", wanted)


EVERY_STEP = """
import contextlib, fundamentallm.prepare as p, shutil
call = json.loads(sys.argv[1])
place = os.path.dirname(call["out"])
def die_at(n):
    "SIGKILL before the n-th time that anything below `place` is opened to be written, flushed, cut, renamed or removed."
    left = [n]
    def step():
        left[0] -= 1
        if not left[0]: os.kill(os.getpid(), 9)
    def hook(event, args):
        if event == "open" and isinstance(args[0], str) and args[0].startswith(place) and args[2] & (os.O_WRONLY | os.O_RDWR): step()
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and place in str(args[0]): step()
    sys.addaudithook(hook)
    for module, name in ((os, "fsync"), (os, "ftruncate"), (p.ShardWriter, "add"), (p.ShardWriter, "close")):
        def first(*a, real=getattr(module, name)): step(); return real(*a)
        setattr(module, name, first)
killed, n = 0, 0
while True:
    n += 1
    pid = os.fork()
    if not pid:
        die_at(n)
        p.prepare(**call)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status): assert os.WEXITSTATUS(status) == 0; break
    killed += 1
    if os.path.exists(call["out"]): assert os.path.exists(call["out"] + "/manifest.json")
    if n % 3 == 0:                          # from the beginning: else most is done already
        for name in os.listdir(place): shutil.rmtree(os.path.join(place, name))
print(killed)
"""  # a fork is a process, without the time that Python takes to start


def test_killed_at_every_step(call: dict[str, Any], tmp_path: Path) -> None:
    "SIGKILL before each single change of the file system, the merge and the last rename among them."
    call = {**call, "files": call["files"][:1], "block_bytes": 30_000, "out": str(tmp_path / "whole")}
    finish(call)
    process = start({**call, "out": str(tmp_path / "made" / "out")}, EVERY_STEP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and int(out) > 50, out + err
    assert_whole(tmp_path / "made" / "out", tree(tmp_path / "whole"))


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); run()"


@pytest.mark.parametrize("limit", [0, 30_000, 300_000])
def test_no_room_for_a_file(limit: int, call: dict[str, Any], wanted: dict[str, bytes], tmp_path: Path) -> None:
    "No file may grow beyond a size: one line, nothing half-written; with room again, it goes on."
    call = {**call, "out": str(tmp_path / "out")}
    process = start(call, LIMIT.format(limit))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err and err.count("\n") == 1, err
    assert "cannot write" in err and ".out.partial" in err and "same command" in err
    assert not (tmp_path / "out").exists()
    _, kept, _ = finish(call)
    assert (kept > 0) == (limit == 300_000)             # the first pass, over the characters, is some 40 kB
    assert_whole(tmp_path / "out", wanted)


def test_disk_full(call: dict[str, Any], wanted: dict[str, bytes], tmp_path: Path) -> None:
    "A real file system that has room for the parts, but not for the shards beside them."
    disk, size = tmp_path / "disk", sum(map(len, wanted.values()))
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.7 * size)}", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        call = {**call, "out": str(disk / "out")}
        process = start(call)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "No space left" in err and "result" in err and err.count("\n") == 1, err
        assert not (disk / "out").exists() and os.listdir(journal(disk / "out").parent) == ["parts"]
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        blocks, kept, _ = finish(call)
        assert blocks == kept
        assert_whole(disk / "out", wanted)
    finally: subprocess.run(["umount", "-l", str(disk)], check=True)


HALF = """
def progress(done, total):
    if done > total/2 and not os.path.exists("go"):
        print("half", flush=True); sys.stdin.readline(); open("go", "w")
run(progress=progress)
"""


def test_second_process_is_locked_out(call: dict[str, Any], wanted: dict[str, bytes], tmp_path: Path) -> None:
    "Two processes never write the same data; the second one says so, and does no harm."
    call = {**call, "out": str(tmp_path / "made" / "out")}
    first = start(call, HALF, stdin=subprocess.PIPE, cwd=tmp_path)
    assert first.stdout and first.stdout.readline() == "half\n"
    second = start(call)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1 and err.count("\n") == 1 and "another process" in err, err
    first.communicate("\n", timeout=60)
    assert first.returncode == 0
    assert_whole(tmp_path / "made" / "out", wanted)
    assert finish(call)[2]                              # and a third finds that there is nothing left to do


WORKER = """
import multiprocessing
def progress(done, total):
    if done > total/2 and not os.path.exists("go"):
        open("go", "w"); os.kill(multiprocessing.active_children()[0].pid, 9)
if __name__ == "__main__": run(progress=progress)
"""


def test_worker_dies(call: dict[str, Any], wanted: dict[str, bytes], tmp_path: Path) -> None:
    "The kernel kills a worker for want of memory: one line, no waiting for ever, and it goes on when called again."
    call = {**call, "out": str(tmp_path / "made" / "out"), "workers": 2}
    process = start(call, WORKER, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("\n") == 1 and "memory" in err and "fewer workers" in err, err
    blocks, kept, _ = finish({**call, "workers": 1})
    assert 0 <= kept < blocks
    assert_whole(tmp_path / "made" / "out", wanted)


def test_first_error(tmp_path: Path) -> None:
    "Of several bad lines the first is named, whichever worker comes to which first."
    lines = [json.dumps({"text": "word " * (3000 if i < 40 else 3)}) for i in range(80)]
    lines[39] = lines[60] = lines[61] = "{"                     # the blocks before the first bad one are long, those after it short
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    process = start({"files": [str(tmp_path / "bad.jsonl")], "out": str(tmp_path / "out"), "workers": 2, "block_bytes": 20_000})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "line 40 " in err and err.count("\n") == 1, err


def test_ctrl_c(call: dict[str, Any], wanted: dict[str, bytes], tmp_path: Path) -> None:
    "Ctrl-C at a terminal reaches parent and workers alike: it stops, quietly, and says how to go on."
    call = {**call, "out": str(tmp_path / "made" / "out"), "workers": 2}
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"    # also where these tests run in the background, deaf to Ctrl-C
    process = start(call, heard + HALF, stdin=subprocess.PIPE, cwd=tmp_path, start_new_session=True)
    assert process.stdout and process.stdout.readline() == "half\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err and "same command" in err, err
    finish(call)
    assert_whole(tmp_path / "made" / "out", wanted)


@pytest.fixture
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "The address of a cluster of one machine."
    pytest.importorskip("ray")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    dir = Path("/tmp") / f"fray{os.getpid()}"           # short: Ray puts sockets in it
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats",
             "--object-store-memory=100000000", f"--temp-dir={dir}"]
    code = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
    head = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        assert head.stdout
        for line in head.stdout:
            if "block forever" in line: break
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.communicate(timeout=60)
        subprocess.run(["rm", "-rf", str(dir)], check=True)


def test_ray(ray_cluster: str, call: dict[str, Any], wanted: dict[str, bytes], tmp_path: Path) -> None:
    "The same bytes on a cluster; what was done by a process is not done again; a bad file is the same one-line error."
    call = {**call, "out": str(tmp_path / "made" / "out"), "workers": 1, "block_bytes": 8000}
    stopped = start(call, LIMIT.format(300_000))
    stopped.communicate(timeout=60)
    blocks, kept, _ = finish({**call, "workers": "ray"}, env={"RAY_ADDRESS": ray_cluster})
    assert 0 < kept < blocks
    assert_whole(tmp_path / "made" / "out", wanted)
    (tmp_path / "bad.txt").write_bytes("good\ncafé".encode("latin-1"))
    code = "import ray; ray.init(address=os.environ['RAY_ADDRESS'], log_to_driver=False, logging_level='ERROR', configure_logging=False); run()"
    process = start({"files": [str(tmp_path / "bad.txt")], "out": str(tmp_path / "no"), "workers": "ray"}, code, env={"RAY_ADDRESS": ray_cluster})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "bad.txt" in err and "offset 8" in err and "Traceback" not in err, err


def test_no_ray_cluster(call: dict[str, Any], tmp_path: Path) -> None:
    "Without a cluster, one line says how to start one."
    pytest.importorskip("ray")
    process = start({**call, "out": str(tmp_path / "out"), "workers": "ray"}, env={"RAY_TMPDIR": str(tmp_path)})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "ray start" in err.splitlines()[-1] and "Traceback" not in err, err
