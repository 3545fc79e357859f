"""What goes wrong on a real machine: kills, full disks, broken bytes, bad archives and models."""
import csv
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest

from musicgen.core import Layout, Refusal, read_settings, write_atomic
from musicgen.features import Corpus, make_piece, write_corpus, write_features
from musicgen.ingest import Source, download, ingest
from musicgen.preprocess import preprocess, read_scan, scan_files
from musicgen.score import DRUMS, make_score, read_midi, write_midi
from musicgen.tokens import Vocab

posix = pytest.mark.skipif(os.name != "posix", reason="a limit or signal of POSIX")


@pytest.fixture
def root(tmp_path) -> Layout: return Layout(tmp_path / "a root")


def tune(seed: int, notes: int = 24):
    "A tune of its own for every seed."
    dice = np.random.default_rng(seed)
    pitches = 60 + np.cumsum(dice.integers(-4, 5, notes)) % 24
    lengths = dice.choice([120, 240, 360, 480], notes)
    onsets = np.cumsum(lengths) - lengths
    rows = [(t, 0, p, d, 80) for t, p, d in zip(onsets, pitches, lengths, strict=True)]
    return make_score(rows, [int(dice.integers(80))])


def write_tunes(folder, count: int):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count): (folder / f"{k:03d}.mid").write_bytes(write_midi(tune(k)))


def start(code: str, *words) -> subprocess.Popen:
    "A Python process that does what the code says."
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill(process: subprocess.Popen):
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL


def wait_for(what, seconds: float = 30):
    "Until it is so."
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.005)


def refusal_of(does, *words, **more) -> str:
    "The one sentence of a refusal."
    with pytest.raises(Refusal) as refused: does(*words, **more)
    sentence = refused.value.sentence
    assert 10 < len(sentence) < 800, sentence
    return sentence


# Kills.

@posix
def test_killed_in_the_middle_of_a_write(tmp_path):
    "kill -9 between the first half of a file and the second: the old file stands."
    path = tmp_path / "song.mid"
    path.write_bytes(b"old")
    code = ("import sys, time\nfrom musicgen.core import write_atomic\n"
            "def slow(part):\n"
            "    with open(part, 'wb') as f: f.write(b'ne'); f.flush()\n"
            "    print('half', flush=True); time.sleep(60)\n"
            "write_atomic(sys.argv[1], slow)")
    process = start(code, path)
    assert process.stdout.readline() == "half\n"
    kill(process)
    assert path.read_bytes() == b"old" and not list(tmp_path.glob("*.mid.part"))
    assert [p.name for p in tmp_path.glob("*.mid")] == ["song.mid"], "what is left is not a song"
    assert write_atomic(path, b"new").read_bytes() == b"new"


@posix
def test_killed_at_any_moment_of_many_writes(tmp_path):
    "Twelve kills at random moments: each time one version or the other, whole."
    path, size = tmp_path / "song.mid", 300_000
    code = ("import itertools, sys\nfrom musicgen.core import write_atomic\n"
            "for k in itertools.cycle('ab'):\n"
            f"    write_atomic(sys.argv[1], k * {size}); print(k, flush=True)")
    dice, seen = np.random.default_rng(0), set()
    for _ in range(12):
        process = start(code, path)
        process.stdout.readline()
        time.sleep(float(dice.uniform(0, 0.05)))
        kill(process)
        text = path.read_text()
        assert len(text) == size and len(set(text)) == 1
        seen.add(text[0])
    assert seen <= set("ab")


@posix
def test_killed_while_it_unpacks(root, tmp_path):
    "An ingest killed inside an archive leaves nothing that the next one takes for done."
    write_tunes(tmp_path / "tunes", 3)
    packed = tmp_path / "tunes.zip"
    data = [(tmp_path / f"tunes/{k:03d}.mid").read_bytes() for k in range(3)]
    with zipfile.ZipFile(packed, "w") as z:
        for k in range(3000): z.writestr(f"{k}.mid", data[k % 3])
    write_source(root, kind="local", path=str(packed))
    code = ("import sys\nfrom musicgen.core import Layout\nfrom musicgen.ingest import ingest\n"
            "ingest(Layout(sys.argv[1]))")
    process = start(code, root.root)
    part = root.external / ".mine.part"
    wait_for(lambda: part.exists() and len(list(part.rglob("*.mid"))) > 20)
    kill(process)
    assert not (root.external / "mine").exists() and not (root.raw / "mine").exists()
    row, = ingest(root)
    assert row["files"] == 3 and row["twice"] == 2997
    assert not part.exists() and not list(root.raw.glob(".*"))


@posix
def test_killed_while_it_scans(root, tmp_path):
    "The scan goes on where it was killed, and ends as it would have ended."
    write_tunes(root.raw / "mine", 60)
    other = Layout(tmp_path / "undisturbed")
    shutil.copytree(root.raw, other.raw)
    code = ("import sys\nfrom musicgen.core import Layout\n"
            "from musicgen.preprocess import preprocess\n"
            "preprocess(Layout(sys.argv[1]), workers=1)")
    process, journal = start(code, root.root), root.scan.with_suffix(".journal")
    wait_for(lambda: journal.exists() and journal.read_text().count("\n") > 5)
    kill(process)
    assert not root.scan.exists(), "a scan that is not finished is not there"
    refusal_of(read_scan, root)
    preprocess(root, workers=1)
    preprocess(other, workers=1)
    assert root.scan.read_bytes() == other.scan.read_bytes()
    assert not journal.exists()


@posix
@pytest.mark.parametrize("moment", ["features.OriginalityIndex.save", "features.Vocab.save"])
def test_killed_while_it_packs(root, moment):
    "A corpus is there when its index is, and the index comes last."
    write_tunes(root.raw / "mine", 12)
    preprocess(root, workers=1)
    write_features(root)
    before = Corpus(root).hash
    (root.raw / "mine/000.mid").unlink()
    preprocess(root, workers=1)
    code = ("import os, sys\nimport musicgen.features as features\n"
            "from musicgen.core import Layout\n"
            f"{moment} = lambda *a, **k: os.kill(os.getpid(), 9)\n"
            "features.write_features(Layout(sys.argv[1]))")
    process = start(code, root.root)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "run the features stage" in refusal_of(Corpus, root)
    write_features(root)
    assert Corpus(root).hash != before and len(Corpus(root).lines) == 11


# Full disks.

FULL = ("import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))\n")


@posix
def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "song.mid"
    path.write_bytes(b"old")
    code = FULL + ("from musicgen.core import write_atomic\n"
                   "try: write_atomic(sys.argv[2], b'x' * 100_000)\n"
                   "except OSError as e: print('OSError')")
    said, wrong = start(code, 1000, path).communicate(timeout=60)
    assert said == "OSError\n", wrong
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["song.mid"]


@posix
def test_a_full_disk_keeps_the_old_corpus_or_none(root):
    "And a later run, with room again, is as good as ever."
    write_tunes(root.raw / "mine", 12)
    preprocess(root, workers=1)
    code = FULL + ("from musicgen.core import Layout\n"
                   "from musicgen.features import write_features\n"
                   "try: write_features(Layout(sys.argv[2]))\n"
                   "except OSError as e: print('OSError')")
    said, wrong = start(code, 1100, root.root).communicate(timeout=60)
    assert said.endswith("OSError\n"), wrong
    assert "run the features stage" in refusal_of(Corpus, root)
    assert not list(root.processed.rglob("*.part"))
    write_features(root)
    assert len(Corpus(root).lines) == 12


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Layout:
    "A root with a model that has learnt nothing."
    import torch

    from musicgen.model import MusicLSTM, MusicLSTMConfig, save_model
    layout = Layout(tmp_path_factory.mktemp("house"))
    torch.manual_seed(0)
    save_model(MusicLSTM(MusicLSTMConfig(hidden=24, head=16)), layout.model)
    return layout


@posix
def test_a_full_disk_is_one_sentence_in_the_shell(house, tmp_path):
    out = tmp_path / "out.mid"
    out.write_bytes(b"old")
    code = FULL + "from musicgen.cli import main\nsys.exit(main(sys.argv[2:]))"
    process = start(code, 200, "generate", "--root", house.root, "-o", out)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 2 and said == "" and wrong.count("\n") == 1, wrong
    assert wrong.startswith("musicgen: ") and "large" in wrong
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == ["out.mid"]


# Broken MIDI, in hex. What is wrong stands beside it.

HEAD = "4d546864 00000006 0001 0001 01e0 4d54726b "
NOTE = "4d54726b 0000000d 00903c40 8360803c00 00ff2f00"   # a track of one note
BROKEN = {
    "nothing at all": "",
    "a head cut short": "4d546864 000000",
    "no track": "4d546864 00000006 0001 0000 01e0",
    "another kind of file": "504b0304 14000000 08000000 21000000 00000000",
    "a track longer than the file": HEAD + "000000ff 00903c40 8360803c00 00ff2f00",
    "a track without an end": HEAD + "00000009 00903c40 8360803c00",
    "a track cut inside an event": HEAD + "00000003 00903c",
    "an event without a status": HEAD + "00000007 003c40 00ff2f00",
    "a text longer than its track": HEAD + "00000008 00ff017f6161 0000",
    "a delta time that never ends": HEAD + "0000000a ffffffff ffffff7f 903c40",
    "a note that is never let go": HEAD + "00000008 00903c40 00ff2f00",
    "a note let go that was never struck": HEAD + "00000008 00803c40 00ff2f00",
    "a pitch above 127": HEAD + "0000000d 0090bc40 8360803c00 00ff2f00",
    "a tempo of nothing": HEAD + "00000014 00ff5103000000 00903c40 8360803c00 00ff2f00",
    "a metre over nothing": HEAD + "00000015 00ff5804000000 08 00903c40 8360803c00 00ff2f00",
    "a metre over 2 ** 255": HEAD + "00000015 00ff580404ff1808 00903c40 8360803c00 00ff2f00",
    "no ticks to the beat": "4d546864 00000006 0001 0001 0000" + NOTE,
    "ticks of film, not of music": "4d546864 00000006 0001 0001 e728" + NOTE,
    "a head that says it is longer": "4d546864 000000ff 0001 0001 01e0 4d54726b 00000004 00ff2f00",
    "notes for a hundred days": HEAD + "0000000f 00903c40 ffffff7f803c00 00ff2f00",
}


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> dict[str, dict]:
    "The row of each broken file."
    folder = tmp_path_factory.mktemp("broken")
    paths = {}
    for k, (name, text) in enumerate(BROKEN.items()):
        path = folder / f"{k}.mid"
        path.write_bytes(bytes.fromhex(text))
        paths[path] = name
    return {paths[path]: row for path, row in scan_files(paths, workers=1)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_has_its_row(scanned, name):
    "A reason in one line, or facts that are finite."
    row = scanned[name]
    assert row.get("sha256", hashlib.sha256(bytes.fromhex(BROKEN[name])).hexdigest()) == \
        hashlib.sha256(bytes.fromhex(BROKEN[name])).hexdigest()
    if "reason" in row: assert row["reason"].strip() and "\n" not in row["reason"]
    else:
        assert 0 <= row["notes"] <= 1 and np.isfinite([row["beats"], row["seconds"]]).all()
        assert row["tempo"] > 0 and row["seconds"] <= 6 * 3600


def test_the_worst_are_refused(scanned):
    for name in ("nothing at all", "a head cut short", "another kind of file",
                 "a track longer than the file", "a track cut inside an event",
                 "notes for a hundred days"):
        assert "reason" in scanned[name], name


def test_a_file_that_kills_the_parser_costs_one_row(root):
    "Twelve tunes and three killers: twelve pieces, three reasons."
    write_tunes(root.raw / "mine", 12)
    for k, killer in enumerate(KILLERS): (root.raw / f"mine/killer-{k}.mid").write_bytes(killer)
    scan = preprocess(root, workers=2)
    assert (scan.verdict == "ok").sum() == 12 and len(scan) == 12 + len(KILLERS)
    bad = scan[scan.path.str.contains("killer")]
    assert (bad.verdict == "refused").all() and (bad.reason != "").all()
    assert bad.reason.str.startswith("crashed the MIDI parser").any(), "tame: find others"
    assert write_features(root)[0]["pieces"] == 12


KILLERS = [bytes.fromhex(HEAD + text) for text in (
    "00000012 0a9f817f728d16fa059b52cbaf6de948c02b",
    "00000029 07ad061a97631ba8399fb5e21c98e21aa28a63fcb8b3d25793a16b2983f39e3915b2b65dac2f46f991",
    "00000031 d727d9830c560b8beab0977d81414bdcad83f60372b3a615076ac102c10cb9a7ee9efac5750f4e9fd2"
    "391153db8872a782")]


@pytest.mark.parametrize("command", ["verify", "regenerate"])
def test_a_file_that_kills_the_parser_is_a_sentence_in_the_shell(house, tmp_path, command):
    for k, killer in enumerate(KILLERS):
        path = tmp_path / f"{k}.mid"
        path.write_bytes(killer)
        process = start("import sys\nfrom musicgen.cli import main\nsys.exit(main(sys.argv[1:]))",
                        command, path, "--root", house.root)
        said, wrong = process.communicate(timeout=60)
        assert (process.returncode, said, wrong.count("\n")) == (2, "", 1), wrong


# Archives and downloads.

def write_source(root: Layout, **facts):
    "A `data/sources.yaml` of one source."
    facts = dict(name="mine", licence="not stated", **facts)
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts.items()]
    write_atomic(root.sources, "- " + "\n  ".join(lines) + "\n")


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items(): z.writestr(name, data)
    return out.getvalue()


def tarred(*members: tuple[str, bytes | str]) -> bytes:
    "A tar.gz; a member whose content is text is a link to there."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str): info.type, info.linkname = tarfile.SYMTYPE, content
            else: info.size = len(content)
            t.addfile(info, io.BytesIO(content if isinstance(content, bytes) else b""))
    return out.getvalue()


GOOD = write_midi(tune(0))
NASTY = {
    "truncated.zip": (zipped({f"{k}.mid": write_midi(tune(k)) for k in range(9)})[:-400],
                      "cannot be unpacked"),
    "truncated.tar.gz": (tarred(*((f"{k}.mid", os.urandom(4000)) for k in range(9)))[:-9000],
                         "cannot be unpacked"),
    "empty.zip": (b"", "cannot be unpacked"),
    "climbs.zip": (zipped({"good.mid": GOOD, "../../evil.mid": GOOD}), "leads outside"),
    "absolute.zip": (zipped({"/tmp/evil.mid": GOOD}), "leads outside"),
    "windows.zip": (zipped({"..\\evil.mid": GOOD, "C:\\evil.mid": GOOD}), "leads outside"),
    "climbs.tar.gz": (tarred(("good.mid", GOOD), ("../../evil.mid", GOOD)), "leads outside"),
    "link.tar.gz": (tarred(("link.mid", "/etc/passwd")), "link or device"),
    "through.tar.gz": (tarred(("door", "/tmp"), ("door/evil.mid", GOOD)), "link or device"),
    "bomb.zip": (zipped({"bomb.mid": bytes(50_000_000)}), "times its size"),
    "bomb.tar.gz": (tarred(("bomb.mid", bytes(50_000_000))), "times its size"),
}


@pytest.mark.parametrize("name", NASTY)
def test_an_archive_that_means_harm(root, tmp_path, name):
    "Refused by name, whole, with nothing written outside and nothing believed inside."
    data, why = NASTY[name]
    (tmp_path / name).write_bytes(data)
    write_source(root, kind="local", path=str(tmp_path / name))
    sentence = refusal_of(ingest, root)
    assert name in sentence and why in sentence, sentence
    assert not [*tmp_path.rglob("*evil*"), *tmp_path.parent.glob("*evil*")]
    assert not list(root.external.glob("mine*")) and not (root.raw / "mine").exists()
    assert not root.manifest.exists()
    assert sum(p.stat().st_size for p in root.root.rglob("*") if p.is_file()) < 10_000


def test_a_good_archive_is_taken(root, tmp_path):
    "The counter-check: the same door lets harmless music in, under safe names."
    (tmp_path / "good.zip").write_bytes(zipped({"a b/ü?.mid": GOOD, "notes.txt": b"hello"}))
    write_source(root, kind="local", path=str(tmp_path / "good.zip"))
    ingest(root)
    with open(root.manifest, newline="") as f: row, = csv.DictReader(f)
    assert (root.raw / row["path"]).read_bytes() == GOOD and row["licence"] == "not stated"
    assert row["sha256"] == hashlib.sha256(GOOD).hexdigest() and " " not in row["path"]


@pytest.fixture
def site(tmp_path):
    "A web site of one folder, on this machine: its address, its folder, what has been asked."
    folder, asked = tmp_path / "site", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=str(folder))
        def log_message(self, *a): asked.append(self.path)
        def do_GET(self):
            if not self.path.startswith("/cut"): return super().do_GET()
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder, asked
        server.shutdown()


def test_a_download_with_another_hash(root, site):
    "Source, address, expected, got, consequence; and nothing is kept."
    address, folder, _ = site
    (folder / "songs.zip").write_bytes(zipped({"a.mid": GOOD}))
    url, expected = f"{address}/songs.zip", "0" * 64
    got = hashlib.sha256((folder / "songs.zip").read_bytes()).hexdigest()
    write_source(root, kind="url", url=url, sha256=expected)
    sentence = refusal_of(ingest, root)
    assert all(words in sentence for words in ("mine", url, expected, got, "deleted")), sentence
    assert not [p for p in root.external.rglob("*") if p.is_file()]
    assert not (root.raw / "mine").exists()
    write_source(root, kind="url", url=url, sha256=got)
    assert ingest(root)[0]["files"] == 1


def test_a_download_that_is_cut_off(root, site, tmp_path):
    address, _, asked = site
    path = tmp_path / "songs.zip"
    source = Source("mine", "url", "not stated", url=f"{address}/cut.zip")
    sentence = refusal_of(download, source, path, tries=2, pause=0)
    assert "2 attempts" in sentence and len(asked) >= 2 and not path.exists()


def test_a_download_that_is_not_there(root, site, tmp_path):
    address, _, asked = site
    source = Source("mine", "url", "not stated", url=f"{address}/none.zip")
    sentence = refusal_of(download, source, tmp_path / "x")
    assert "404" in sentence and "1 attempts" in sentence, "a 404 is not tried again"


# Empty and half-written corpora.

def test_nothing_to_work_on(root, tmp_path):
    "Each stage says which one is missing before it."
    (tmp_path / "empty").mkdir()
    assert "gave no piece" in refusal_of(ingest, root, midi=tmp_path / "empty")
    assert "run the ingest stage" in refusal_of(preprocess, root)
    assert "run the preprocess stage" in refusal_of(write_features, root)
    assert "run the features stage" in refusal_of(Corpus, root)


def test_too_little_to_work_on(root):
    write_tunes(root.raw / "mine", 3)
    sentence = refusal_of(preprocess, root, workers=1)
    assert "3 of 3 files" in sentence and "at least 10" in sentence


@pytest.fixture
def packed(root) -> Layout:
    vocab = Vocab()
    pieces = [make_piece(tune(k), vocab, f"mine/{k}", "mine") for k in range(3)]
    write_corpus(root, pieces, ["train", "valid", "test"], ["yours"] * 3, vocab)
    assert len(Corpus(root).pieces("train")) == 1
    return root


@pytest.mark.parametrize("name", ["corpus", "index", "vocab"])
def test_a_missing_piece_of_a_corpus(packed, name):
    getattr(packed, name).unlink()
    with pytest.raises((Refusal, FileNotFoundError)): Corpus(packed)


def test_another_corpus_under_the_same_index(packed):
    rows = np.load(packed.corpus)
    rows[3, 2] ^= 1
    np.save(packed.corpus, rows)
    assert "another corpus" in refusal_of(Corpus, packed)


def test_another_vocabulary_under_the_same_index(packed):
    Vocab(grid=12, longest=48).save(packed.vocab)
    assert "another corpus" in refusal_of(Corpus, packed)
    packed.vocab.write_text(packed.vocab.read_text().replace('"grid": 12', '"grid": 13'))
    assert "vocabulary" in refusal_of(Corpus, packed)


def test_a_half_written_array(packed):
    data = packed.corpus.read_bytes()
    for size in (0, 5, 90, len(data) - 7):
        packed.corpus.write_bytes(data[:size])
        with pytest.raises((Refusal, ValueError, EOFError)): Corpus(packed)


def test_a_half_written_index(packed):
    text = packed.index.read_text()
    packed.index.write_text(text[:len(text) - 9])
    assert "another corpus" in refusal_of(Corpus, packed)


# Settings.

@pytest.mark.parametrize("text", [
    b"port = 3\n", b"[api]\nport\n", b"[api]\nhost = \xff\n", b"[api]\nport = x\n",
    b"[api]\nprot = 1\n", b"[apo]\nport = 1\n"])
def test_settings_that_make_no_sense(root, text):
    write_atomic(root.settings, text)
    refusal_of(read_settings, root)


# Damaged models.

class Payload:
    "What a pickle does when it is loaded: here, it leaves a file."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "pickle", "inside"])
def test_a_pickled_model_is_refused_and_not_run(house, tmp_path, form):
    import torch

    from musicgen.model import load_model
    path, mark = tmp_path / "music_lstm.pt", tmp_path / "executed"
    if form == "torch": torch.save(Payload(mark), path)
    elif form == "pickle": path.write_bytes(pickle.dumps(Payload(mark)))
    else:
        model = torch.load(house.model, weights_only=True)
        torch.save(model | dict(provenance=Payload(mark)), path)
    assert str(path) in refusal_of(load_model, path)
    assert not mark.exists(), "the payload was run"
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the counter-check: it is a payload"


def test_a_damaged_checkpoint_is_refused(house, tmp_path):
    import torch

    from musicgen.model import load_model
    data, path = house.model.read_bytes(), tmp_path / "music_lstm.pt"
    other = io.BytesIO()
    torch.save(dict(config=3, weights={}), other)
    for broken in (b"PK\3\4", data[:len(data) // 2], data[:-10], GOOD, b"{}" * 500, b"",
                   other.getvalue()):
        path.write_bytes(broken)
        assert str(path) in refusal_of(load_model, path)


def test_damaged_weights_are_refused(house, tmp_path):
    "Cut off, absurd, foreign, without what they should say: one sentence each, the file named."
    from musicgen.generate import open_studio
    data, here = house.weights.read_bytes(), Layout(tmp_path)
    size = int.from_bytes(data[:8], "little")
    from safetensors.numpy import save
    for broken in (b"", data[:4], data[:size // 2], data[:-10],
                   (1 << 60).to_bytes(8, "little") + data[8:],
                   data[:8] + b"x" * size + data[8 + size:], GOOD, save({"a": np.zeros(3)}),
                   save({"a": np.zeros(3)}, {"musicgen": "{"})):
        write_atomic(here.weights, broken)
        assert str(here.weights) in refusal_of(open_studio, here)


def test_weights_that_are_not_what_they_say(house, tmp_path):
    "Right in form and wrong inside: another number, a table that is missing, a name of nobody."
    from safetensors.numpy import save

    from musicgen.decoder import read_weights
    from musicgen.generate import open_studio
    weights, about = read_weights(house.weights)
    here, name = Layout(tmp_path), "parts.weight"
    changed = weights | {name: weights[name] + 1}
    for held, told in ((changed, about), ({k: v for k, v in weights.items() if k != name}, about),
                       (weights | {name: weights[name][:3]}, about),
                       (weights, {"hash": about["hash"]}), (weights, [1])):
        write_atomic(here.weights, save(held, {"musicgen": json.dumps(told)}))
        assert str(here.weights) in refusal_of(open_studio, here)
    write_atomic(here.weights, save(weights, {"musicgen": json.dumps(about)}))
    assert open_studio(here).model_hash == about["hash"]


def test_a_damaged_index_of_originals(house, tmp_path):
    from musicgen.generate import open_studio
    here = Layout(tmp_path)
    write_atomic(here.weights, house.weights.read_bytes())
    for broken in (b"", b"PK\3\4", GOOD, pickle.dumps(Payload(tmp_path / "executed"))):
        write_atomic(here.model_originality, broken)
        assert here.model_originality.name in refusal_of(open_studio, here)
    np.savez(here.model_originality, text=np.array([Payload(tmp_path / "executed")], object))
    refusal_of(open_studio, here)
    assert not (tmp_path / "executed").exists()


def test_the_door_is_as_it_was(house):
    "After all this, music."
    from musicgen.generate import Request, generate, open_studio
    take = generate(open_studio(house), Request(bars=1, instruments=["piano", "drums"]))[0]
    assert [p.program for p in read_midi(take.midi).parts] == [0, DRUMS]
