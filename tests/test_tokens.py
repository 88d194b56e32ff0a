"From text to tokens to a model on the command line, in real processes: learn a tokenizer, prepare, train on shards, and what is refused."
from __future__ import annotations

import gzip
import json
import random
import subprocess
from pathlib import Path

import pytest

from conftest import fundamentallm
from test_cli import assert_one_line_error


@pytest.fixture(scope="module")
def place(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A directory with a packed jsonl file of 200 documents, and a tokenizer learned from it: the two commands of the README."
    cwd = tmp_path_factory.mktemp("tokens")
    rng, lines = random.Random(0), corpus.read_text().splitlines()
    with gzip.open(cwd / "docs.jsonl.gz", "wt", encoding="utf-8") as f:
        for i in range(200): f.write(json.dumps({"id": i, "text": "\n".join(rng.choices(lines, k=3)) + " é🎭"}) + "\n")
    done = fundamentallm("tokenizer", "train", "docs.jsonl.gz", "-o", "tok", "--vocab-size", "320", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "vocab_size=320" in done.stdout
    return cwd


def words(*command: str | Path, cwd: Path) -> str:
    "What a command that must succeed prints."
    done = fundamentallm(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shards(place: Path) -> Path:
    "Those documents as shards."
    out = words("data", "prepare", "docs.jsonl.gz", "--tokenizer", "tok", "--fractions", "0.8,0.1,0.1", "-o", "shards", cwd=place)
    assert "train" in out and "val" in out and "test" in out and "fundamentallm train shards" in out
    return place / "shards"


@pytest.fixture(scope="module")
def run(place: Path, shards: Path) -> Path:
    "A tiny run on the shards."
    out = words("train", "shards", "--preset", "tiny", "-o", "run", cwd=place)
    assert "Best validation loss" in out and "A sample:" in out
    return place / "run"


def test_tokenizer_show(place: Path) -> None:
    out = words("tokenizer", "show", "tok", "the king é", cwd=place)
    assert "' king'" in out and "bytes a token" in out
    listed = words("tokenizer", "show", "tok", cwd=place)
    assert "<pad> <unk> <bos> <eos>" in listed and "fingerprint" in listed


@pytest.mark.parametrize("kind", ["char", "word", "wordpiece"])
def test_other_kinds(kind: str, place: Path) -> None:
    words("tokenizer", "train", "docs.jsonl.gz", "-o", kind, "--kind", kind, "--vocab-size", "120", cwd=place)
    assert "tokens," in words("tokenizer", "show", kind, "the king", cwd=place)


def test_train_evaluate_generate(place: Path, shards: Path, run: Path) -> None:
    "The run has the tokenizer of the shards, and evaluates on their test part as on the same text."
    assert json.loads((run / "checkpoints/best/tokenizer.json").read_text()) == json.loads((shards / "tokenizer.json").read_text())
    result = json.loads(words("evaluate", "run", "shards", "--json", cwd=place))
    assert 0 < result["bits_per_byte"] < 8 and result["tokens"] > 100
    assert words("generate", "run", "--prompt", "The king", "--max-tokens", "10", cwd=place).startswith("The king")


def test_resume_on_shards(place: Path, run: Path) -> None:
    "A resumed run goes on with the same shards and refuses others."
    config = (run / "config.yaml").read_text()
    steps = int(next(line.split(":")[1] for line in config.splitlines() if line.strip().startswith("steps:")))
    words("train", "shards", "-o", "run", "--resume", f"train.steps={steps + 5}", cwd=place)
    words("data", "prepare", "docs.jsonl.gz", "--tokenizer", "tok", "--seed", "7", "-o", "other", cwd=place)
    assert_one_line_error(fundamentallm("train", "other", "-o", "run", "--resume", f"train.steps={steps + 9}", cwd=place), "other", "not the text")


def test_refused(place: Path, shards: Path, run: Path, tmp_path: Path) -> None:
    "Another tokenizer, an altered shard, a lost one: each named in one line."
    words("tokenizer", "train", "docs.jsonl.gz", "-o", "tok2", "--vocab-size", "290", cwd=place)
    words("data", "prepare", "docs.jsonl.gz", "--tokenizer", "tok2", "--fractions", "0.8,0.1,0.1", "-o", "shards2", cwd=place)
    assert_one_line_error(fundamentallm("evaluate", "run", "shards2", cwd=place), "tokenizer")
    assert_one_line_error(fundamentallm("train", "shards", "data.tokenizer=tok2", "-o", "new", cwd=place), "tokenizer")
    (place / "shards2/tokenizer.json").write_bytes((shards / "tokenizer.json").read_bytes())
    assert_one_line_error(fundamentallm("train", "shards2", "-o", "new", cwd=place), "tokenizer")
    words("data", "prepare", "docs.jsonl.gz", "--tokenizer", "tok", "-o", "broken", cwd=place)
    shard = place / "broken/train/00000.bin"
    data = bytearray(shard.read_bytes()); data[100] ^= 1; shard.write_bytes(data)
    assert_one_line_error(fundamentallm("train", "broken", "-o", "new", cwd=place), "00000.bin", "SHA-256")
    shard.write_bytes(data[:-2])
    assert_one_line_error(fundamentallm("train", "broken", "-o", "new", cwd=place), "00000.bin", "truncated")
    assert not (place / "new").exists()


@pytest.mark.parametrize("command, needed", [
    (("data", "prepare", "nothing-*.txt", "-o", "x"), "nothing-*.txt"),
    (("data", "prepare", "docs.jsonl.gz", "--field", "body", "-o", "x"), "body"),
    (("data", "prepare", "docs.jsonl.gz", "--tokenizer", "gpt3", "-o", "x"), "gpt3"),
    (("data", "prepare", "empty.txt", "-o", "x"), "empty"),
    (("data", "prepare", "latin.txt", "-o", "x"), "offset 4"),
    (("tokenizer", "train", "docs.jsonl.gz", "-o", "x", "--vocab-size", "200"), "260"),
    (("tokenizer", "train", "docs.jsonl.gz", "-o", "tok"), "exists"),
    (("tokenizer", "show", "no-such-place"), "no-such-place"),
])
def test_bad_input(command: tuple[str, ...], needed: str, place: Path) -> None:
    (place / "empty.txt").write_text(""); (place / "latin.txt").write_bytes("caf\u00e9 noir".encode("latin1") + b" \xe9t\xe9")
    done = fundamentallm(*command, cwd=place)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert needed.replace("offset 4", "offset 3") in done.stderr and "Traceback" not in done.stderr
    assert not (place / "x").exists()


def test_errors_option(place: Path) -> None:
    "--errors skip and replace take what fail refuses."
    (place / "mixed.jsonl").write_bytes(b'{"text": "good one, long enough"}\n{"text": "caf\xe9"}\n{"text": \n{"text": "another good one"}\n')
    done = fundamentallm("data", "prepare", "mixed.jsonl", "-o", "strict", cwd=place)
    assert_one_line_error(done, "mixed.jsonl", "offset")
    assert "2 document(s)" in words("data", "prepare", "mixed.jsonl", "--errors", "skip", "--fractions", "1,0,0", "-o", "skipped", cwd=place)


def test_done_already(place: Path, shards: Path) -> None:
    "The same command again has nothing to do; another one does not touch what is there."
    before = {p: p.stat().st_mtime_ns for p in shards.rglob("*")}
    words("data", "prepare", "docs.jsonl.gz", "--tokenizer", "tok", "--fractions", "0.8,0.1,0.1", "-o", "shards", cwd=place)
    done: subprocess.CompletedProcess[str] = fundamentallm("data", "prepare", "docs.jsonl.gz", "--tokenizer", "char", "-o", "shards", cwd=place)
    assert_one_line_error(done, "shards", "exists")
    assert before == {p: p.stat().st_mtime_ns for p in shards.rglob("*")}


def test_published_tokenizer(place: Path) -> None:
    "GPT-2's tokenizer on a glob, and a model on what comes out: the commands of the README."
    out = words("data", "prepare", "docs*.jsonl.gz", "--tokenizer", "gpt2", "-o", "shards/docs", cwd=place)
    assert "fundamentallm train shards/docs" in out
    assert json.loads((place / "shards/docs/train/index.json").read_text())["vocab_size"] == 50257
    words("train", "shards/docs", "--preset", "tiny", "-o", "runs/docs", "train.steps=2", cwd=place)
    assert json.loads((place / "runs/docs/checkpoints/last/config.json").read_text())["vocab_size"] == 50257


def test_text_with_a_published_tokenizer(place: Path, corpus: Path) -> None:
    "A text file and data.tokenizer=gpt2: encoded at once, without shards."
    words("train", corpus, "data.tokenizer=gpt2", "--preset", "tiny", "-o", "runs/direct", "train.steps=2", cwd=place)
    assert "tokenizer: gpt2" in (place / "runs/direct/config.yaml").read_text()
