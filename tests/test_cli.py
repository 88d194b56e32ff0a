"The command line end to end, in real processes: every command, every bad input, Ctrl-C, a full disk, a terminal and a pipe."
from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import COMMAND, environment, fundamentallm

ANSI = re.compile(r"\x1b\[|\r|\x08")


def assert_one_line_error(done: subprocess.CompletedProcess[str], *needed: str, code: int = 1) -> None:
    "Exit code, one line on stderr that says what and what to do, no traceback, and nothing that looks like success."
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for word in needed: assert word in lines[0], (word, lines[0])


# ---- start-up -------------------------------------------------------------------------------------------------------


def seconds(*command: str) -> float:
    "The median time of three runs of a command."
    def once() -> float:
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment())
        return time.perf_counter() - began
    return statistics.median(once() for _ in range(3))


def test_help_is_quick() -> None:
    "--help loads neither torch nor numpy nor rich, and takes a fraction of what importing torch takes."
    code = "import sys\nfrom fundamentallm.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    heavy = {"torch", "numpy", "pydantic", "hydra", "rich", "matplotlib", "prompt_toolkit", "transformers", "fundamentallm.core"}
    assert done.returncode == 0 and not heavy & set(eval(done.stderr))
    assert seconds(*COMMAND, "--help") < 0.5 * seconds(sys.executable, "-c", "import torch")


def test_import_is_light() -> None:
    "`import fundamentallm` loads nothing else."
    code = "import sys; before = set(sys.modules); import fundamentallm; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert set(eval(done.stdout)) <= {"fundamentallm", "__future__"}


@pytest.mark.parametrize("words", [[], ["train"], ["generate"], ["evaluate"], ["data"], ["data", "list"], ["data", "fetch"], ["doctor"], ["bench"], ["config"], ["config", "show"]])
def test_help(words: list[str]) -> None:
    "Each command explains itself on stdout."
    done = fundamentallm(*words, "--help")
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("Usage: fundamentallm")
    assert words in ([], ["data"], ["bench"], ["config"]) or "Example" in done.stdout


# ---- train ----------------------------------------------------------------------------------------------------------


def test_train_tells_what_came_out(trained: subprocess.CompletedProcess[str], cwd: Path, run_dir: Path) -> None:
    "Piped output is plain; the loss curve exists; a sample is shown; the three commands it names all work."
    assert not ANSI.search(trained.stdout + trained.stderr)
    curve = re.search(r"Loss curve: (\S+)", trained.stdout)
    assert curve and (cwd / curve[1]).stat().st_size > 1000
    assert "A sample:" in trained.stdout and "Best validation loss:" in trained.stdout
    said = trained.stdout + trained.stderr
    assert "loss" in said and re.search(r"tok\S*/s", said)
    commands = [shlex.split(line) for line in trained.stdout.splitlines() if line.startswith("  fundamentallm ")]
    assert [c[1] for c in commands] == ["generate", "generate", "evaluate"]
    for command in commands:
        done = fundamentallm(*command[1:], cwd=cwd, stdin="The king\n/quit\n")
        assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr
    assert (run_dir / "config.yaml").exists() and (run_dir / "events.jsonl").exists()
    assert not list(cwd.glob("**/*.tmp*"))


def test_transformers_opens_it(run_dir: Path) -> None:
    "transformers' AutoModelForCausalLM opens RUN/checkpoints/best and gives our logits."
    import torch
    from transformers import AutoModelForCausalLM

    from fundamentallm.checkpoint import load_model
    best = run_dir / "checkpoints" / "best"
    ids = torch.randint(4, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): ours, theirs = load_model(best)(ids), AutoModelForCausalLM.from_pretrained(best)(ids).logits
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_then_resume(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    "SIGINT or SIGTERM in the middle: a checkpoint, exit code 0, one line with the command that goes on; and it does, to the end. Meanwhile nobody else may write there."
    steps = 500
    words = ["train", str(corpus), "--preset", "tiny", "-o", "my run", f"train.steps={steps}", "train.eval_every=250"]
    process = subprocess.Popen([*COMMAND, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # where tests run in the background, Ctrl-C is ignored
    events = tmp_path / "my run" / "events.jsonl"
    deadline = time.time() + 60
    while not (events.exists() and events.read_text().count("\n") > 20) and time.time() < deadline and process.poll() is None: time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err
    line = out.strip().splitlines()[-1]
    assert line.startswith("stopped at step") and "Traceback" not in out + err
    again = shlex.split(line[line.index("fundamentallm train"):])
    assert "--resume" in again
    done = fundamentallm(*again[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = [r["step"] for r in map(json.loads, events.read_text().splitlines()) if "loss" in r]
    assert seen == sorted(set(seen)) and len(seen) == steps     # every step once, none lost, none done twice


def test_two_trainers(run_dir: Path, tmp_path: Path, cwd: Path) -> None:
    "While one process trains in a run, another is refused, and nothing in the run changes."
    import fcntl
    run = tmp_path / "run"
    shutil.copytree(run_dir, run, symlinks=True)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with open(run / ".lock", "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        for how in ("--resume", "--overwrite"): assert_one_line_error(fundamentallm("train", "book.txt", "--preset", "tiny", "-o", run, how, cwd=cwd) if how == "--overwrite"
                                                                      else fundamentallm("train", "book.txt", "-o", run, how, "train.steps=120", cwd=cwd), "another process", "run")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_dial_and_environment(corpus: Path, tmp_path: Path) -> None:
    "--params sets the shape; .env says where runs go; both are told apart from the settings of the run."
    (tmp_path / "book.txt").write_bytes(corpus.read_bytes())
    (tmp_path / ".env").write_text("FUNDAMENTALLM_RUNS=elsewhere\nWANDB_API_KEY=secret-key\n")
    done = fundamentallm("train", "book.txt", "--params", "200k", "train.steps=2", "train.batch_size=2", "train.accumulate=1", "model.context=32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = (tmp_path / "elsewhere" / "book" / "config.yaml").read_text()
    assert "secret-key" not in saved and "secret-key" not in done.stdout
    shown = fundamentallm("config", "show", tmp_path / "elsewhere" / "book")
    assert shown.stdout == saved
    log = (tmp_path / "elsewhere" / "book" / "train.log").read_text()
    count = int(re.search(r"([\d,]+) parameters", log)[1].replace(",", ""))  # type: ignore[index]
    assert abs(count / 200_000 - 1) < 0.1, count
    (tmp_path / ".env").write_text("FUNDAMENTALLM_LR=3\n")
    assert_one_line_error(fundamentallm("train", "book.txt", "--preset", "tiny", cwd=tmp_path), "FUNDAMENTALLM_LR")


def test_resume_without_the_text(run_dir: Path, tmp_path: Path, cwd: Path) -> None:
    "A finished run can be resumed with more steps; the text is the one it remembers."
    run = tmp_path / "run"
    shutil.copytree(run_dir, run, symlinks=True)
    done = fundamentallm("train", "--resume", "-o", run, "train.steps=110", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "train.steps" not in done.stderr and (run / "checkpoints").is_dir()
    assert max(json.loads(line)["step"] for line in (run / "events.jsonl").read_text().splitlines()) in (109, 110)


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD_TRAINING = {  # name: (words after `train`, what the line must say)
    "missing file": (["nothing.txt"], ["nothing.txt", "does not exist"]),
    "misspelt data set": (["tiny-shakespear"], ["did you mean tiny-shakespeare"]),
    "directory": (["folder"], ["folder", "directory"]),
    "empty file": (["empty.txt"], ["empty.txt", "empty"]),
    "shorter than a context": (["short.txt"], ["short", "context", "32"]),
    "a single word": (["word.txt"], ["longer text"]),
    "binary file": (["binary.txt"], ["binary.txt", "binary", "offset"]),
    "latin-1": (["latin.txt"], ["latin.txt", "UTF-8", "offset"]),
    "utf-16": (["utf16.txt"], ["utf16.txt", "UTF-16", "convert"]),
    "unknown key": (["book.txt", "model.dims=64"], ["model.dims", "did you mean model.dim"]),
    "unknown key by a synonym": (["book.txt", "optim.learning_rate=1"], ["optim.learning_rate", "optim.lr"]),
    "out of range": (["book.txt", "train.steps=-5"], ["train.steps", "-5"]),
    "not a number": (["book.txt", "model.dim=wide"], ["model.dim", "wide"]),
    "heads do not divide": (["book.txt", "model.dim=30", "model.n_heads=4"], ["30", "4"]),
    "a dial that fits nothing": (["book.txt", "--params", "lots"], ["lots", "10M"]),
    "a sweep without values": (["book.txt", "--sweep", "optim.lr"], ["optim.lr", "KEY=VALUE"]),
    "a sweep of nothing": (["book.txt", "--sweep", "optim.rate=1,2"], ["optim.rate"]),
    "unknown preset": (["book.txt", "--preset", "smal"], ["smal", "small"]),
    "no such device": (["book.txt", "train.device=tpu"], ["tpu", "cpu"]),
}
MISUSE = {
    "no text": ([], ["train book.txt"]),
    "two texts": (["book.txt", "empty.txt"], ["one text"]),
    "resume and overwrite": (["book.txt", "--resume", "--overwrite"], ["--resume", "--overwrite"]),
    "unknown option": (["book.txt", "--stepz", "3"], ["--stepz", "--help"]),
}


@pytest.fixture(scope="module")
def bad_runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.CompletedProcess[str], list[str]]]:
    "What each bad call came to, two at a time (most of it is waiting for torch to load), and what it left behind."
    home = tmp_path_factory.mktemp("bad")
    files = {"book.txt": corpus.read_bytes(), "empty.txt": b"", "short.txt": b"shorter than one context, yet\n", "word.txt": b"word", "binary.txt": b"abc\0\1\2" * 50,
             "latin.txt": "caf\u00e9 au lait ".encode("latin-1") * 90, "utf16.txt": ("text " * 99).encode("utf-16")}

    def call(name: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        here = home / name.replace(" ", "_")
        (here / "folder").mkdir(parents=True)
        for file, content in files.items(): (here / file).write_bytes(content)
        words, _ = {**BAD_TRAINING, **MISUSE}[name]
        preset = [] if "--preset" in words else ["--preset", "tiny"]
        done = fundamentallm("train", *words, *preset, cwd=here)
        return done, sorted(str(p.relative_to(here)) for p in here.rglob("*") if p.name not in {*files, "folder"})
    names = [*BAD_TRAINING, *MISUSE]
    with ThreadPoolExecutor(2) as pool: return dict(zip(names, pool.map(call, names)))


@pytest.mark.parametrize("name", [*BAD_TRAINING, *MISUSE])
def test_bad_training(name: str, bad_runs: dict[str, tuple[subprocess.CompletedProcess[str], list[str]]]) -> None:
    "One line naming cause and cure, an exit code, and nothing written."
    done, left = bad_runs[name]
    _, needed = {**BAD_TRAINING, **MISUSE}[name]
    assert_one_line_error(done, *needed, code=2 if name in MISUSE else 1)
    assert not done.stdout and not left, (done.stdout, left)


def test_existing_run(cwd: Path, run_dir: Path) -> None:
    "A run that is there is not touched: the error asks for --resume or --overwrite."
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    done = fundamentallm("train", "book.txt", "--preset", "tiny", cwd=cwd)
    assert_one_line_error(done, "runs/book", "--resume", "--overwrite")
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_overwrite(corpus: Path, tmp_path: Path, run_dir: Path) -> None:
    "--overwrite begins anew."
    shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    done = fundamentallm("train", corpus, "--preset", "tiny", "-o", tmp_path / "run", "--overwrite", "train.steps=6", "train.checkpoint_every=3")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "events.jsonl").read_text().count('"loss"') == 6
    assert not (tmp_path / "run" / "checkpoints" / "step-000100").exists()


def test_overwrite_keeps_the_run_when_the_text_is_bad(tmp_path: Path, run_dir: Path) -> None:
    "Nothing the user had is lost to a mistake in the new command."
    shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    (tmp_path / "empty.txt").touch()
    done = fundamentallm("train", "empty.txt", "--preset", "tiny", "-o", "run", "--overwrite", cwd=tmp_path)
    assert_one_line_error(done, "empty.txt")
    assert (tmp_path / "run" / "checkpoints" / "best").exists()


def damaged(run_dir: Path, to: Path, what: str) -> Path:
    "A copy of a run whose best checkpoint has a fault."
    shutil.copytree(run_dir, to, symlinks=True)
    best = (to / "checkpoints" / "best").resolve()
    weights = best / "model.safetensors"
    if what == "truncated": os.truncate(weights, weights.stat().st_size // 2)
    if what == "altered":
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    if what == "missing": (best / "config.json").unlink()
    if what == "no manifest": (best / "manifest.json").write_text("{")
    return to


@pytest.mark.parametrize("what, file", [("truncated", "model.safetensors"), ("altered", "model.safetensors"), ("missing", "config.json"), ("no manifest", "manifest.json")])
def test_damaged_checkpoint(what: str, file: str, run_dir: Path, tmp_path: Path, cwd: Path) -> None:
    "The file is named; neither generate nor evaluate goes on with it."
    run = damaged(run_dir, tmp_path / "run", what)
    for words in (["generate", run], ["evaluate", run, "book.txt"])[:2 if what == "truncated" else 1]:
        done = fundamentallm(*words, cwd=cwd)
        assert_one_line_error(done, file)
        assert not done.stdout


def test_wrong_places(cwd: Path) -> None:
    "Neither a run nor a checkpoint; a prompt, a text with characters the model has never seen."
    (cwd / "odd.txt").write_text("The king \u263a", encoding="utf-8")
    cases = ((["generate", "nowhere"], ["nowhere", "does not exist"]), (["generate", "."], ["run"]), (["generate", "book.txt"], ["book.txt", "file"]),
             (["generate", "runs/book", "--prompt", "na\u00efve"], ["U+00EF", "position 2"]),
             (["generate", "runs/book", "--device", "tpu"], ["tpu"]), (["evaluate", "runs/book", "odd.txt"], ["U+263A"]),
             (["data", "fetch", "tiny-shakespear"], ["did you mean", "tiny-shakespeare"]))
    with ThreadPoolExecutor(2) as pool: results = list(pool.map(lambda case: fundamentallm(*case[0], cwd=cwd), cases))
    for done, (_, needed) in zip(results, cases):
        assert_one_line_error(done, *needed)
        assert not done.stdout


def test_empty_prompt(cwd: Path) -> None:
    "Begins at <bos>: text, with nothing before it."
    done = fundamentallm("generate", "runs/book", "--prompt", "", "--max-tokens", "12", "--seed", "0", cwd=cwd)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 13), done


@pytest.mark.parametrize("option, value", [("--temperature", "-1"), ("--top-p", "1.5"), ("--top-k", "many"), ("--num-samples", "0"), ("--max-tokens", "-3"), ("--seed", "-1"),
                                           ("--min-p", "1.1"), ("--typical-p", "-0.1"), ("--repetition-penalty", "0"), ("--presence-penalty", "much"), ("--frequency-penalty", "x"),
                                           ("--no-repeat-ngram", "-1")])
def test_option_out_of_range(option: str, value: str, cwd: Path) -> None:
    "The option, the value and its limits."
    assert_one_line_error(fundamentallm("generate", "runs/book", option, value, cwd=cwd), option, value, code=2)


# ---- a full disk ----------------------------------------------------------------------------------------------------

FULL = """
import errno, os
real, calls = os.fsync, [0]
def fsync(fd):
    calls[0] += 1
    if calls[0] > int(os.environ["FULL_AFTER"]): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(fd)
os.fsync = fsync
"""


def assert_nothing_half_written(run: Path) -> None:
    "Every checkpoint that has its final name is whole, and no temporary file is left."
    from fundamentallm.checkpoint import verify
    for checkpoint in (run / "checkpoints").glob("step-*"): verify(checkpoint)
    assert not [p for p in run.rglob("*") if "tmp" in p.name], list(run.rglob("*"))


@pytest.mark.parametrize("after", [0, 40])
def test_no_space_at_fsync(after: int, corpus: Path, tmp_path: Path) -> None:
    "The disk is full when files are made durable: at once, which is an error; or from some checkpoint on: training goes on to its end, and that it is not saved is an error."
    (tmp_path / "sitecustomize.py").write_text(FULL)
    done = fundamentallm("train", corpus, "--preset", "tiny", "-o", tmp_path / "run", "train.checkpoint_every=10",
                         env={"PYTHONPATH": str(tmp_path), "FULL_AFTER": str(after)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^Error: .*[Nn]o space left.*", done.stderr, re.M) and "free" in done.stderr, done.stderr
    assert_nothing_half_written(tmp_path / "run")
    if after: assert "trained to step 100, but not saved" in done.stderr and "NO CHECKPOINT WAS WRITTEN" in done.stderr, done.stderr


def test_space_comes_back(corpus: Path, tmp_path: Path, run_dir: Path) -> None:
    "The disk is full for a while: a loud warning, training goes on, and the end is the bits of a run that never noticed."
    (tmp_path / "sitecustomize.py").write_text(FULL.replace("if calls[0] >", "if 22 > calls[0] >"))
    done = fundamentallm("train", corpus, "--preset", "tiny", "-o", tmp_path / "run", env={"PYTHONPATH": str(tmp_path), "FULL_AFTER": "20"})
    assert done.returncode == 0 and "NO CHECKPOINT WAS WRITTEN" in done.stderr, done.stderr
    ours, theirs = ((r / "checkpoints" / "last" / "model.safetensors").read_bytes() for r in (tmp_path / "run", run_dir))
    assert ours == theirs
    assert_nothing_half_written(tmp_path / "run")


def test_no_space_on_a_small_disk(corpus: Path, tmp_path: Path) -> None:
    "A real file system of 600 kB fills up."
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        done = fundamentallm("train", corpus, "--preset", "tiny", "-o", disk / "run", "train.checkpoint_every=5", "train.steps=60", "train.keep=50")
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
        assert re.search(r"^Error: .*[Nn]o space left", done.stderr, re.M), done.stderr
        assert_nothing_half_written(disk / "run")
    finally: subprocess.run(["umount", "-l", str(disk)], check=True)


def test_directory_not_writable(corpus: Path, tmp_path: Path) -> None:
    "A run below a file cannot be made."
    (tmp_path / "file").touch()
    assert_one_line_error(fundamentallm("train", corpus, "--preset", "tiny", "-o", tmp_path / "file" / "run"), "file")


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate(cwd: Path) -> None:
    "The same seed gives the same text; sample 1 of 3 is the single sample; RUN and its best checkpoint are the same."
    words = ["--prompt", "The king", "--seed", "3", "--max-tokens", "40", "--temperature", "0.7", "--top-k", "20", "--top-p", "0.95"]
    calls = [["generate", "runs/book", *words], ["generate", "runs/book/checkpoints/best", *words], ["generate", "runs/book", *words, "--num-samples", "3"]]
    with ThreadPoolExecutor(2) as pool: one, same, three = pool.map(lambda w: fundamentallm(*w, cwd=cwd), calls)
    assert one.returncode == 0 and not one.stderr and one.stdout == same.stdout and len(one.stdout) == 8 + 40 + 1
    parts = re.split(r"--- sample \d of 3 ---\n", three.stdout)
    assert parts[1] == one.stdout and len(set(parts[1:])) == 3


def test_generate_dials(cwd: Path) -> None:
    "Each dial does what it says: greedy text without it repeats itself; at its neutral value it changes nothing; a number that is none is refused."
    greedy = ["generate", "runs/book", "-p", "The king", "-n", "12", "-t", "0"]
    drawn = ["generate", "runs/book", "-p", "The king", "-n", "12", "-t", "1", "--seed", "5"]
    calls = [greedy, [*greedy, "--no-repeat-ngram", "2"], [*greedy, "--repetition-penalty", "1e6"], [*greedy, "--presence-penalty", "1e4"], [*greedy, "--frequency-penalty", "1e4"],
             drawn, [*drawn, "--min-p", "1"], [*drawn, "--top-k", "2", "--typical-p", "0"],
             [*drawn, "--min-p", "0", "--typical-p", "1", "--repetition-penalty", "1", "--presence-penalty", "0", "--frequency-penalty", "0", "--no-repeat-ngram", "0"],
             [*drawn, "--presence-penalty", "nan"], [*drawn, "--frequency-penalty", "inf"], [*drawn, "--repetition-penalty", "inf"]]
    with ThreadPoolExecutor(2) as pool: done = list(pool.map(lambda w: fundamentallm(*w, cwd=cwd), calls))
    for d in done[:9]: assert d.returncode == 0 and not d.stderr, d.stderr
    plain, pairs, repeated, present, frequent, one, favourite, typical, neutral = (d.stdout[:-1] for d in done[:9])
    twos = [plain[i:i + 2] for i in range(len(plain) - 1)]
    assert len(set(twos)) < len(twos)                                       # without the dial something comes twice
    assert len({pairs[i:i + 2] for i in range(len(pairs) - 1)}) == len(pairs) - 1
    assert len(set(repeated[8:])) > len(set(plain[8:]))                     # more different characters
    assert len(set(present[8:])) == 12 == len(set(frequent[8:]))            # never what was written
    assert favourite == plain and one == neutral and len(typical) == 20
    for d, name in zip(done[9:], ("presence_penalty", "frequency_penalty", "repetition_penalty")): assert_one_line_error(d, name)


def test_broken_pipe_is_quiet(cwd: Path) -> None:
    "`| head -c 5`: nothing on stderr."
    command = " ".join(map(shlex.quote, [*COMMAND, "generate", "runs/book", "--max-tokens", "5000"])) + " | head -c 5"
    done = subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True, env=environment(), timeout=100)
    assert len(done.stdout) == 5 and not done.stderr, done.stderr


def test_interactive_in_a_pipe(cwd: Path) -> None:
    "Lines in, texts out: no prompt, no escape codes; errors on stderr, and in the exit code."
    lines = "/set temperature 0\n/set max_tokens 10\nThe king\n/settings\n/help\n\u263a\n/bogus\n/set top_p 7\n/quit\nThe sea\n"
    done = fundamentallm("generate", "runs/book", "-i", cwd=cwd, stdin=lines)
    assert done.returncode == 1 and not ANSI.search(done.stdout) and "> " not in done.stdout
    out = done.stdout.splitlines()
    assert out[:2] == ["temperature = 0.0", "max_tokens = 10"] and out[2].startswith("The king") and "temperature=0.0" in done.stdout
    assert "/quit" in done.stdout and "The sea" not in done.stdout
    errors = done.stderr.splitlines()
    assert [e.startswith("Error: ") for e in errors] == [True]*3 and "U+263A" in errors[0] and "/help" in errors[1] and "top_p" in errors[2]


def test_interactive_at_a_terminal(cwd: Path, tmp_path: Path) -> None:
    "A prompt with history; settings; errors that do not end it; Ctrl-C at the prompt and in a text; /quit."
    import pexpect
    env = environment(FUNDAMENTALLM_CACHE=str(tmp_path))
    child = pexpect.spawn(COMMAND[0], [*COMMAND[1:], "generate", "runs/book", "--interactive", "--max-tokens", "12"], cwd=str(cwd), env=env,
                          encoding="utf-8", timeout=60, dimensions=(40, 120),
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # where tests run in the background, Ctrl-C is ignored
    prompt = re.compile(r">[ \x08\x1b]")     # prompt_toolkit writes the blank after it by moving the cursor
    child.expect("/help explains")
    child.expect(prompt)
    for line, want in (("/set temperature 0", "temperature = 0.0"), ("/help", "show the settings"), ("The king", "\x1b[1mThe king\x1b[0m"),
                       ("/nonsense", "Error: there is no command /nonsense"), ("\u263a", "Error: character"), ("/set max-tokens 100000", "max_tokens = 100000")):
        child.sendline(line)
        child.expect_exact(want)
        child.expect(prompt)
    child.sendline("The")
    child.expect_exact("\x1b[1mThe\x1b[0m")
    child.expect("[a-z]{2}")
    child.sendintr()                     # stops the text, not the program
    child.expect(prompt)
    child.sendintr()                     # clears the line
    child.expect(prompt)
    child.send("\x1b[A")                 # arrow up: the last line, from the history
    child.expect_exact("The")
    child.sendintr()
    child.expect(prompt)
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "+The king" in (tmp_path / "history").read_text()


# ---- evaluate, data, doctor -----------------------------------------------------------------------------------------


def test_evaluate(cwd: Path) -> None:
    "JSON for programs, a table for people; a box only in a terminal."
    import pexpect
    done = fundamentallm("evaluate", "runs/book", "book.txt", "--json", cwd=cwd)
    result = json.loads(done.stdout)
    assert math.isclose(result["perplexity"], math.exp(result["loss"]), rel_tol=1e-6) and result["loss"] < 2.5
    assert result["tokens"] == len((cwd / "book.txt").read_text()) - 1
    plain = fundamentallm("evaluate", "runs/book", "book.txt", cwd=cwd)
    assert plain.stdout.isascii() and f"{result['loss']:.4f}" in plain.stdout and not plain.stderr
    boxed = pexpect.run(shlex.join([*COMMAND, "evaluate", "runs/book", "book.txt"]), cwd=str(cwd), env=environment(), encoding="utf-8", timeout=60)
    assert "┃" in boxed and "\x1b[" in boxed


TASK = [{"name": "ends", "kind": "cloze"}, *({"prompt": f"The king of a {w[:2]}", "answer": w[2:]} for w in ("merry", "land", "went", "never", "came", "back", "sang", "songs"))]


@pytest.fixture(scope="session")
def task_file(cwd: Path) -> str:
    "A task in the words of the book."
    (cwd / "ends.jsonl").write_text("\n".join(map(json.dumps, TASK)) + "\n")
    return "ends.jsonl"


def test_examine(cwd: Path, task_file: str) -> None:
    "A run, a task of one's own and a text: marks with errors; the training text is found and the questions looked for in it; the library gives the same numbers."
    from fundamentallm.checkpoint import load_model, load_tokenizer
    from fundamentallm.suite import ModelExaminee, mark, read_task
    best = cwd / "runs" / "book" / "checkpoints" / "best"
    done = fundamentallm("evaluate", "runs/book", "book.txt", "--task-file", task_file, "--items", "20", "--json", cwd=cwd)
    assert done.returncode == 0 and not done.stderr, done.stderr
    scores = {(s["task"], s["metric"]): s for s in json.loads(done.stdout)["results"]["runs/book"]["scores"]}
    assert list(scores) == [("ends", "acc"), ("ends", "perplexity"), ("book", "bits_per_byte"), ("book", "word_perplexity")]
    for s in mark(read_task(cwd / task_file), ModelExaminee(load_model(best), load_tokenizer(best))):
        assert math.isclose(scores[s.task, s.metric]["value"], s.value, rel_tol=1e-5) and scores[s.task, s.metric]["items"] == 8
    seen = scores["book", "bits_per_byte"]["contamination"]
    assert 12 <= seen["dirty"] <= 20 == seen["checked"] and seen["unit"] == "word"      # nine tenths of the book were read
    (cwd / "other.txt").write_text("Nothing of that.\n")
    other = json.loads(fundamentallm("evaluate", "runs/book", "book.txt", "--task-file", task_file, "--items", "20", "--json", "--train-text", "other.txt", cwd=cwd).stdout)
    assert {s["contamination"]["dirty"] for s in other["results"]["runs/book"]["scores"]} == {0}


def test_examine_all(cwd: Path, task_file: str, tmp_path: Path) -> None:
    "`all` leaves out what the run cannot read and says so; where the training text is not found, so it says."
    shutil.copytree(cwd / "runs" / "book", tmp_path / "book", symlinks=True); shutil.copy(cwd / task_file, tmp_path)
    done = fundamentallm("evaluate", "book", "--tasks", "all", "--task-file", task_file, cwd=tmp_path)
    assert done.returncode == 0 and "--train-text" in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout.splitlines()[0].split() == ["Task", "Metric", "Value", "Stderr"] and "not given: brackets (character '('" in done.stdout
    assert_one_line_error(fundamentallm("evaluate", cwd / "runs" / "book", "--tasks", "all", cwd=cwd), "can read none of the tasks")


def test_compare_runs(cwd: Path, task_file: str, run_dir: Path) -> None:
    "Two candidates on the same questions: differences with errors; a report that is written once, whole."
    early = min((run_dir / "checkpoints").glob("step-*")).relative_to(cwd)
    words = ["evaluate", "runs/book", early, "book.txt", "--task-file", task_file, "--items", "20"]
    done = fundamentallm(*words, "--report", "compared", cwd=cwd)
    assert done.returncode == 0 and done.stdout.isascii() and not ANSI.search(done.stdout), done.stderr
    got = json.loads((cwd / "compared" / "results.json").read_text())
    change = next(c for c in got["comparisons"] if c["task"] == "book")
    a, b = (next(s["value"] for s in got["results"][str(r)]["scores"] if s["metric"] == "bits_per_byte") for r in ("runs/book", early))
    assert math.isclose(change["difference"], b - a, abs_tol=1e-9) and change["low"] < b - a < change["high"] and change["p"] <= change["p_holm"] and change["better"] == "runs/book"
    assert "runs/book" in (cwd / "compared" / "report.md").read_text() and "data:image/png" in (cwd / "compared" / "report.html").read_text()
    assert_one_line_error(fundamentallm(*words, "--report", "compared", cwd=cwd), "compared", "exists")


def test_examine_bad_input(cwd: Path, task_file: str, tmp_path: Path) -> None:
    "Unknown tasks, task files with a mistake, runs that are none: one line that names the place, and nothing written."
    (cwd / "typo.yaml").write_text("name: mine\nkind: cloze\nitems:\n  - {prompt: The, answer: ' king'}\n  - {prompt: The, anwser: ' sea'}\n")
    (cwd / "broken.yaml").write_text("name: mine\nkind: [\n")
    (cwd / "cut.jsonl").write_text((cwd / task_file).read_text()[:-20]); (cwd / "void.yaml").touch()
    (tmp_path / "hollow").mkdir(); (tmp_path / "hollow" / "config.yaml").touch()
    cases = ((["runs/book", "--tasks", "inducton"], 1, ["inducton", "induction"]), (["runs/book", "--tasks", "brackets"], 1, ["brackets", "U+0028"]),
             (["runs/book", "--task-file", "typo.yaml"], 1, ["typo.yaml, line 5", "anwser", "answer"]), (["runs/book", "--task-file", "broken.yaml"], 1, ["broken.yaml, line 3", "YAML"]),
             (["runs/book", "--task-file", "cut.jsonl"], 1, ["cut.jsonl, line 9", "JSON"]), (["runs/book", "--task-file", "void.yaml"], 1, ["void.yaml", "empty"]),
             (["runs/book", "--task-file", "gone.yaml"], 1, ["gone.yaml"]), (["runs/book", "--task-file", "book.txt"], 1, ["book.txt", ".jsonl"]),
             (["runs/nowhere", "--task-file", task_file], 1, ["runs/nowhere", "does not exist"]), ([str(tmp_path / "hollow"), "--task-file", task_file], 1, ["hollow", "no checkpoint"]),
             (["runs/book", "runs/book", "--task-file", task_file], 2, ["named twice"]), (["runs/book", "--task-file", task_file, "--task-file", task_file], 1, ["two tasks are called ends"]),
             (["runs/book", "--task-file", task_file, "--items", "0"], 2, ["--items"]), (["runs/book", "--task-file", task_file, "--train-text", "gone.txt"], 1, ["gone.txt"]),
             (["runs/book"], 2, ["TEST.txt", "--tasks"]), ([], 2, ["RUN"]), (["runs/book", "--report", "empty"], 1, ["no questions"]))
    before = sorted(cwd.rglob("*"))
    with ThreadPoolExecutor(2) as pool: results = list(pool.map(lambda case: fundamentallm("evaluate", *case[0], cwd=cwd), cases))
    for done, (_, code, needed) in zip(results, cases): assert_one_line_error(done, *needed, code=code)
    assert sorted(cwd.rglob("*")) == before


def test_progress_at_a_terminal(corpus: Path, tmp_path: Path) -> None:
    "At a terminal training draws a bar in place; the end of it is the same."
    import pexpect
    command = shlex.join([*COMMAND, "train", str(corpus), "--preset", "tiny", "-o", "run", "train.steps=30"])
    seen = pexpect.run(command, cwd=str(tmp_path), env=environment(), encoding="utf-8", timeout=60)
    assert "\x1b[" in seen and "Loss curve: run/loss_curve.png" in seen and "Traceback" not in seen


def test_data(cwd: Path) -> None:
    "The catalogue as plain columns; fetching prints the path and nothing else; a copy is not written over."
    listed = fundamentallm("data", "list", cwd=cwd)
    assert listed.stdout.splitlines()[0].split() == ["name", "size", "here", "licence", "what"] and listed.stdout.isascii()
    first = fundamentallm("data", "fetch", "tiny-shakespeare", cwd=cwd)
    assert first.returncode == 0, first.stderr
    assert Path(first.stdout.strip()).stat().st_size == 1_115_394
    assert fundamentallm("data", "fetch", "tiny-shakespeare", "-o", "bard.txt", cwd=cwd).stdout == "bard.txt\n"
    assert (cwd / "bard.txt").stat().st_size == 1_115_394
    assert_one_line_error(fundamentallm("data", "fetch", "tiny-shakespeare", "-o", "bard.txt", cwd=cwd), "bard.txt", "exists")


def test_fetch_without_a_network(tmp_path: Path) -> None:
    "No index, no public address: the cause and the cure in one line."
    env = {"FUNDAMENTALLM_CACHE": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "0",
           "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    done = fundamentallm("data", "fetch", "tiny-shakespeare", env=env)
    assert_one_line_error(done, "could not fetch tiny-shakespeare", "connect to the network")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_doctor(cwd: Path) -> None:
    "Versions, devices, and for each missing extra the command that brings it."
    done = fundamentallm("doctor", "--json", cwd=cwd)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["python"]["value"].startswith("3.") and found["device in use"]["value"]
    assert all("pip install 'fundamentallm[" in v["cure"] for k, v in found.items() if k.startswith("extra") and v["value"] != "complete")
    assert not ANSI.search(fundamentallm("doctor", cwd=cwd).stdout)


# ---- the unexpected -------------------------------------------------------------------------------------------------


def test_unexpected_exception() -> None:
    "A bug of ours: one line with the type and how to see more; with --traceback, more."
    code = "import sys, fundamentallm.cli as c\ndef boom(*_): raise KeyError('weird')\nc.load_run = boom\nc.main(sys.argv[1:])"
    plain, full = (subprocess.run([sys.executable, "-c", code, "generate", "x", *more], capture_output=True, text=True, env=environment())
                   for more in ([], ["--traceback"]))
    assert_one_line_error(plain, "KeyError", "weird", "--traceback")
    assert full.returncode == 1 and "Traceback" in full.stderr and "in boom" in full.stderr


def test_version_and_typing_errors() -> None:
    "--version; a command that does not exist names the nearest."
    assert re.fullmatch(r"fundamentallm \d+\.\d+\S*\n", fundamentallm("--version").stdout)
    assert_one_line_error(fundamentallm("trian"), "trian", "Did you mean 'train'", code=2)
