"""From the scan to the corpus: the same bytes however they come about, and never half of two."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from musicgen import features
from musicgen.core import Layout, Rejection, write_atomic
from musicgen.corpus.dataset import Corpus, write_corpus
from musicgen.features import write_features
from musicgen.model.context import make_piece
from musicgen.music.midi import read_midi, write_midi
from musicgen.music.score import Part, make_score
from musicgen.music.similarity import OriginalityIndex
from musicgen.music.tokens import Vocab
from musicgen.preprocess import preprocess, scan_rows

posix = pytest.mark.skipif(os.name != "posix", reason="a limit or signal of POSIX")
DONE = ("corpus", "index", "vocab", "originality")


def tune(seed: int, notes: int = 40):
    "A tune of its own for every seed, in two parts, now and then with a long rest."
    dice = np.random.default_rng(seed)
    pitches = 60 + np.cumsum(dice.integers(-4, 5, notes)) % 24
    onsets = np.cumsum(
        dice.choice([120, 240, 360, 480, 4000], notes, p=[0.3, 0.3, 0.2, 0.19, 0.01])
    )
    rows = [(t, k % 2, p, 110, 80) for k, (t, p) in enumerate(zip(onsets, pitches, strict=True))]
    return make_score(rows, [int(program) for program in dice.integers(0, 80, 2)])


def write_scan(root: Layout, count: int, folder: str = "mine"):
    "So many tunes and a scan that accepts them, without the work of a scan."
    lines = ["path,verdict,reason,sha256,split,licence,seconds"]
    for k in range(count):
        path, data = f"{folder}/{k:05d}.mid", write_midi(tune(k))
        write_atomic(root.raw / path, data)
        split = "valid" if k % 10 == 3 else "test" if k % 10 == 7 else "train"
        lines.append(f"{path},ok,,{hashlib.sha256(data).hexdigest()},{split},not stated,9.5")
    write_atomic(root.scan, "\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path) -> Layout:
    return Layout(tmp_path / "a root")


@pytest.fixture
def scanned(root) -> Layout:
    write_scan(root, 60)
    return root


def made(root: Layout) -> dict[str, str]:
    "Every file of the corpus and its hash."
    files = sorted(path for path in root.processed.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root.processed)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def refusal_of(does, *words, **more) -> str:
    "The one sentence of a refusal."
    with pytest.raises(Rejection) as refused:
        does(*words, **more)
    sentence = refused.value.sentence
    assert 10 < len(sentence) < 400, sentence
    return sentence


def start(code: str, *words) -> subprocess.Popen:
    "A Python process that does what the code says."
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# The same bytes.


def test_the_number_of_processes_changes_no_byte(scanned, monkeypatch):
    monkeypatch.setattr(features, "FEW", 1)
    monkeypatch.setattr(features, "BATCH", 7)
    alone = write_features(scanned, workers=1), made(scanned)
    assert alone[0] == [dict(dataset="mine", pieces=60, rows=alone[0][0]["rows"], hours=0.16)]
    assert (write_features(scanned, workers=2), made(scanned)) == alone
    monkeypatch.setattr(features, "BATCH", 60)
    assert (write_features(scanned, workers=1), made(scanned)) == alone


def test_the_order_of_the_folder_changes_no_byte(tmp_path):
    "The same files, written in another order, under a folder that lists them differently."
    one, two = Layout(tmp_path / "one"), Layout(tmp_path / "two")
    names = [f"b/{k}.mid" for k in range(7)] + [f"a/{k}.mid" for k in range(7)]
    data = {name: write_midi(tune(k)) for k, name in enumerate(names)}
    for root, order in ((one, names), (two, reversed(names))):
        for name in order:
            write_atomic(root.raw / name, data[name])
        preprocess(root, workers=1)
        write_features(root)
    assert made(one) == made(two) and len(made(one)) == 14 + 4


def test_one_way_to_write_a_corpus(scanned, tmp_path):
    "Pieces handed over make what files make: rows, index, originality, byte for byte."
    write_features(scanned)
    corpus, other = Corpus(scanned), Layout(tmp_path / "other")
    lines = corpus.lines
    pieces = (
        make_piece(
            read_midi(scanned.raw / f"{line['name']}.mid"), corpus.vocab, line["name"], "mine"
        )
        for line in lines
    )
    write_corpus(
        other, pieces, [line["split"] for line in lines], ["not stated"] * len(lines), corpus.vocab
    )
    assert all(
        getattr(other, name).read_bytes() == getattr(scanned, name).read_bytes() for name in DONE
    )
    index = OriginalityIndex.load(scanned.originality)
    assert index.corpus == corpus.hash and len(index.names) == len(corpus.pieces("train")) == 48


def test_every_piece_has_its_file(scanned):
    "One `.npy` a piece, equal to its rows of the corpus; none that the index does not know."
    write_features(scanned)
    corpus = Corpus(scanned)
    (scanned.tokens / "mine" / "stray.npy").write_bytes(b"")
    write_features(scanned)
    pieces = [p for split in ("train", "valid", "test") for p in corpus.pieces(split)]
    for p in pieces:
        assert np.array_equal(np.load(scanned.tokens / f"{p.name}.npy"), p.rows)
    assert len(list(scanned.tokens.rglob("*.npy"))) == len(pieces) == 60


def test_pieces_are_a_list_that_is_not_there_yet(scanned):
    write_features(scanned)
    pieces = Corpus(scanned).pieces("train")
    assert len(pieces) == 48 and pieces[-1].name == pieces[47].name == list(pieces)[-1].name
    assert [p.name for p in pieces[1:6:2]] == [pieces[k].name for k in (1, 3, 5)]
    assert pieces[0].header is pieces[0].header, "a header is read once"
    with pytest.raises(IndexError):
        pieces[48]


def test_a_header_longer_than_a_line_of_csv_may_be(root):
    "A performance whose tempo changes twenty thousand times is a piece like another."
    tempos = [(t, 500_000 + t) for t in range(20_000)]
    score = make_score([(0, 0, 60, 480, 90), (19_000, 0, 62, 480, 90)], tempos=tempos)
    corpus = write_corpus(root, [make_piece(score, Vocab(), "a/b", "a")], ["train"], ["x"], Vocab())
    assert corpus.pieces("train")[0].header == score.header


# Files that are not what they were.


def test_a_file_that_changed_is_named(scanned):
    "And so is one that is gone. The corpus of before stays."
    write_features(scanned)
    before, path = made(scanned), scanned.raw / "mine/00041.mid"
    path.write_bytes(write_midi(tune(999)))
    said = refusal_of(write_features, scanned)
    assert "mine/00041.mid has changed" in said and "preprocess" in said
    path.unlink()
    assert "mine/00041.mid was scanned and cannot be read" in refusal_of(write_features, scanned)
    assert made(scanned) == before and len(Corpus(scanned).lines) == 60


def test_a_file_that_changed_is_named_by_a_process(scanned, monkeypatch):
    monkeypatch.setattr(features, "FEW", 1)
    (scanned.raw / "mine/00041.mid").write_bytes(write_midi(tune(999)))
    assert "mine/00041.mid has changed" in refusal_of(write_features, scanned, workers=2)
    assert not scanned.index.exists() and not list(scanned.processed.iterdir())


def test_a_piece_that_cannot_be_encoded_is_named(root):
    data = write_midi(make_score([(k, k, 60, 480, 90) for k in range(33)], [0] * 33))
    write_atomic(root.raw / "mine/many.mid", data)
    write_atomic(
        root.scan,
        "path,verdict,reason,sha256,split,licence,seconds\n"
        f"mine/many.mid,ok,,{hashlib.sha256(data).hexdigest()},train,x,1\n",
    )
    assert "mine/many.mid: the piece has 33 parts" in refusal_of(write_features, root)


def test_a_corpus_that_is_not_what_its_index_says(scanned):
    "Cut off, cut off between two lines, changed, of another shape: refused, each in a sentence."
    write_features(scanned)
    whole, lines = scanned.corpus.read_bytes(), scanned.index.read_bytes()
    for broken in (b"", whole[:90], whole[:-5], whole + b"12345", whole[:-1] + b"\xff"):
        scanned.corpus.write_bytes(broken)
        refusal_of(Corpus, scanned)
    scanned.corpus.write_bytes(whole)
    for broken in (lines[:-9], lines[: lines.rindex(b"\r\n", 0, -2) + 2], lines[:200]):
        scanned.index.write_bytes(broken)
        assert "another corpus" in refusal_of(Corpus, scanned)
    scanned.index.write_bytes(lines)
    scanned.vocab.unlink()
    assert "run the features stage" in refusal_of(Corpus, scanned)


# Kills and full disks.

RUN = (
    "import sys\nimport musicgen.features as features\nfrom musicgen.core import Layout\n"
    "print('begins', flush=True)\nfeatures.write_features(Layout(sys.argv[1]))\n"
)


@posix
def test_killed_at_any_moment(scanned):
    "Killed four times: the old corpus or none; then what an undisturbed run makes."
    write_features(scanned)
    old = Corpus(scanned).hash
    write_scan(scanned, 90)
    undisturbed = Layout(scanned.root.parent / "undisturbed")
    shutil.copytree(scanned.root, undisturbed.root)
    write_features(undisturbed)
    wanted, seen, dice = made(undisturbed), set(), np.random.default_rng(0)
    assert Corpus(undisturbed).hash != old
    for _ in range(4):
        process = start(RUN, scanned.root)
        process.stdout.readline()
        time.sleep(float(dice.uniform(0, 0.5)))
        process.kill()
        process.communicate(timeout=30)
        try:
            seen.add(Corpus(scanned).hash)
        except Rejection as e:
            assert "run the features stage" in e.sentence
    assert seen <= {old, Corpus(undisturbed).hash}
    write_features(scanned)
    assert made(scanned) == wanted, "what the kills have left is cleared away"


@posix
@pytest.mark.parametrize(
    "moment, stands",
    [
        ("OriginalityIndex.pack", True),
        ("_take_place", True),
        ("Vocab.save", False),
        ("write_atomic", False),
    ],
)
def test_killed_at_each_step(scanned, moment, stands):
    "Up to the exchange the old corpus stands; from there on none, until the new one is whole."
    write_features(scanned)
    old = Corpus(scanned).hash
    write_scan(scanned, 50)
    code = RUN.replace(
        "print('begins",
        f"features.{moment} = lambda *a, **k: "
        "__import__('os').kill(__import__('os').getpid(), 9)\nprint('begins",
    )
    process = start(code, scanned.root)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    if stands:
        assert Corpus(scanned).hash == old
    else:
        assert "run the features stage" in refusal_of(Corpus, scanned)
    write_features(scanned)
    assert len(Corpus(scanned).lines) == 50 == len(list(scanned.tokens.rglob("*.npy")))
    assert sorted(p.name for p in scanned.processed.iterdir()) == sorted(
        [scanned.tokens.name] + [getattr(scanned, name).name for name in DONE]
    )


@posix
@pytest.mark.parametrize("limit", [300, 4_000])
def test_a_full_disk_keeps_the_old_corpus(scanned, limit):
    "No room for a piece, or none for all of them: the corpus of before stands, nothing is left."
    write_features(scanned)
    before = made(scanned)
    code = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))\n"
        + RUN.replace("features.write", "try: features.write")
        + "except OSError as e: print(type(e).__name__)\n"
    )
    said, wrong = start(code, scanned.root).communicate(timeout=60)
    assert said.endswith("OSError\n"), wrong
    assert made(scanned) == before and len(Corpus(scanned).lines) == 60


# Size.

PEAK = (
    "import re, sys\nfrom pathlib import Path\nfrom musicgen.core import Layout\n"
    "from musicgen.features import write_features\n"
    "write_features(Layout(sys.argv[1]), workers=1)\n"
    "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
)


def test_odd_files_are_read_as_they_were_scanned(root):
    "A wrapped file, one with a name in an old alphabet and one with a tail: what the scan mended, features mend again."
    data = write_midi(
        make_score([(480 * k, 0, 60 + k % 7, 480, 90) for k in range(20)], [Part(40, "Fur Elise")])
    )
    odd = dict(
        rmi=b"RIFF\0\0\0\0RMIDdata\0\0\0\0" + data,
        latin=data.replace(b"Fur", b"F\xfcr"),
        tail=data + b"junk",
        loud=data.replace(b"\x3c\x5a", b"\x3c\xda", 1),
        sound=data,
    )
    for k, (name, content) in enumerate(
        odd.items()
    ):  # for another instrument each, or they were one piece
        write_atomic(
            root.raw / f"mine/{name}.mid", content.replace(bytes((0xC0, 40)), bytes((0xC0, 30 + k)))
        )
    preprocess(root, workers=1, min_pieces=1)
    reasons = {row["path"]: row["reason"] for row in scan_rows(root) if row["verdict"] == "ok"}
    assert [path for path, reason in reasons.items() if not reason.startswith("mended: ")] == [
        "mine/sound.mid"
    ]
    assert write_features(root, workers=1)[0]["pieces"] == len(reasons) == 5


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads a peak of Linux")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    "Eight times the pieces in less than 2.5 MB more; their rows alone are twice that."
    score = make_score([(60 * k, 0, 48 + k % 24, 60, 90) for k in range(700)])
    data, peaks = write_midi(score), []
    for count in (200, 1_600):
        root = Layout(tmp_path / str(count))
        write_atomic(root.raw / "mine/0.mid", data)
        lines = ["path,verdict,reason,sha256,split,licence,seconds"]
        digest = hashlib.sha256(data).hexdigest()
        for k in range(count):
            if k:
                os.link(root.raw / "mine/0.mid", root.raw / f"mine/{k}.mid")
            lines.append(f"mine/{k}.mid,ok,,{digest},{'train' if k % 10 == 0 else 'test'},x,1")
        write_atomic(root.scan, "\n".join(lines) + "\n")
        said, wrong = start(PEAK, root.root).communicate(timeout=120)
        peaks.append(int(said.split()[-1]) / 1024)
        assert root.corpus.stat().st_size > count * 3_400, wrong
    assert peaks[1] - peaks[0] < 2.5, peaks
