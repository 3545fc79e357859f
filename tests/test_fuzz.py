"""Random music, rows, bytes and requests: whatever comes in, what goes out is right."""

import functools
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from musicgen.core import Layout, Rejection
from musicgen.generation.generate import generate, open_model, regenerate
from musicgen.generation.receipt import verify
from musicgen.generation.request import Request
from musicgen.music.chunks import midi_shape
from musicgen.music.edit import lint
from musicgen.music.grid import on_grid
from musicgen.music.instruments import DRUMS, GM
from musicgen.music.midi import midi_channels, read_midi, write_midi
from musicgen.music.score import (
    DURATION,
    ONSET,
    PART,
    PITCH,
    VELOCITY,
    Part,
    Score,
    make_score,
)
from musicgen.music.smf import TICKS
from musicgen.music.tokens import FIELDS, Vocab, decode, encode


def tries(number: int):
    "The same examples on every machine and every day, without a deadline."
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Random music.

PART_NAMES = st.sampled_from(["", "Solo", "Ünïcode ♪"])
PARTS = st.lists(st.builds(Part, st.integers(0, DRUMS), PART_NAMES), min_size=1, max_size=6)
METRES = st.tuples(st.integers(1, 16), st.sampled_from([2, 4, 8, 16]))


@st.composite
def scores(draw) -> Score:
    "Any music: unsorted, overlapping, off every grid, in any number of ticks to the beat."
    parts, ticks = draw(PARTS), draw(st.sampled_from([1, 24, 96, 100, 384, 480, 960, 1023]))
    time = st.integers(0, 40 * ticks)
    note = st.tuples(
        time,
        st.integers(0, len(parts) - 1),
        st.integers(0, 127),
        st.integers(1, 12 * ticks),
        st.integers(1, 127),
    )
    tempo = st.tuples(time, st.integers(200_000, 2_000_000))
    tempos = [(0, 500_000), *draw(st.lists(tempo, max_size=2))]
    metres = [
        (0, *draw(METRES)),
        *draw(
            st.lists(st.tuples(time, METRES), max_size=2).map(
                lambda changes: [(t, *metre) for t, metre in changes]
            )
        ),
    ]
    notes = draw(st.lists(note, max_size=40))
    return make_score(notes, parts, ticks=ticks, tempos=tempos, metres=metres)


VOCABS = st.sampled_from([Vocab(), Vocab(grid=12, longest=48), Vocab(grid=4, longest=7)])


@tries(150)
@given(scores(), VOCABS)
def test_rows_hold_the_score_on_the_grid(score, vocab):
    "The round trip: decode(encode(x)) == on_grid(x); and twice is the same as once."
    rows, expected = encode(score, vocab), on_grid(score, vocab.grid)
    assert rows.dtype == np.uint8 and rows.shape[1:] == (len(FIELDS),)
    assert (rows < np.array(vocab.sizes)).all()
    back = decode(rows, score, vocab)
    assert back == expected
    assert on_grid(expected, vocab.grid) == expected and np.array_equal(encode(back, vocab), rows)
    assert not [problem for problem in lint(back) if "never heard" not in problem]


@tries(100)
@given(scores(), st.sampled_from([4, 24, 480]))
def test_the_grid_moves_nothing_by_more_than_half_a_step(score, grid):
    "Onsets and ends; but a note has a step at least, and ends where its pitch begins again."
    step = lambda tick: (2 * tick * grid + score.ticks) // (2 * score.ticks)
    voices = {}
    for onset, part, pitch, duration, _ in score.notes.tolist():
        for tick in (onset, onset + duration):
            assert abs(step(tick) * score.ticks - tick * grid) * 2 <= score.ticks
        ends = voices.setdefault((part, pitch), {})
        ends[step(onset)] = max(step(onset) + 1, step(onset + duration), ends.get(step(onset), 0))
    on_the_grid = {
        (part, pitch, at): at + duration
        for at, part, pitch, duration, _ in on_grid(score, grid).notes.tolist()
    }
    for voice, ends in voices.items():
        for at, end in ends.items():
            again = min((other for other in ends if other > at), default=end)
            assert on_the_grid.pop((*voice, at)) == min(end, again)
    assert not on_the_grid


def rows_of(vocab: Vocab):
    "Rows that a model could write, whether they make sense or not."
    return st.lists(st.tuples(*(st.integers(0, size - 1) for size in vocab.sizes)), max_size=40)


@tries(150)
@given(rows_of(Vocab()), PARTS)
def test_any_rows_decode(rows, parts):
    "Whatever a model writes, the score is clean, and encoded again it gives the same score."
    vocab, header = Vocab(), make_score((), parts)
    score = decode(np.array(rows, np.uint8).reshape(-1, 5), header, vocab)
    assert not [problem for problem in lint(score) if "never heard" not in problem]
    assert score.parts == header.parts and len(score.notes) <= len(rows)
    assert decode(encode(score, vocab), header, vocab) == score


@tries(60)
@given(st.binary(max_size=200).map(lambda b: np.frombuffer(b[: len(b) // 5 * 5], np.uint8)))
def test_any_bytes_as_rows_decode(numbers):
    "Values that no vocabulary has, too."
    score = decode(numbers.reshape(-1, 5), make_score((), [Part(0), Part(DRUMS)]), Vocab())
    assert not [problem for problem in lint(score) if "never heard" not in problem]


@tries(100)
@given(scores())
def test_what_is_written_is_read(score):
    "On the grid, a file holds parts, notes, tempos and metres as they were."
    score = on_grid(score, 24)
    silent = set(range(len(score.parts))) - set(score.notes[:, 1].tolist())
    back = read_midi(write_midi(score))
    assert back.ticks == 480 and len(back.notes) == len(score.notes)
    if not silent and len(score.parts) <= 15:
        again = on_grid(back, 24)
        assert np.array_equal(again.notes, score.notes)
        assert [p.program for p in again.parts] == [p.program for p in score.parts]
        assert np.array_equal(again.metres, score.metres) or not len(score.notes)
        assert np.array_equal(again.tempos, score.tempos) or not len(score.notes)


def mido_bytes(score: Score) -> bytes:
    "The bytes that mido, event by event, makes of a score in 480 ticks."
    import mido

    end = int(score.bar_lines()[-1])
    file = mido.MidiFile(type=1, ticks_per_beat=TICKS, charset="utf-8")
    events = [
        (t, 0, mido.MetaMessage("time_signature", numerator=n, denominator=d))
        for t, n, d in score.metres.tolist()
    ]
    events += [(t, 2, mido.MetaMessage("set_tempo", tempo=us)) for t, us in score.tempos.tolist()]
    events += [(t, 3, mido.MetaMessage("text", text=words)) for t, words in score.texts]
    for k, channel in enumerate([0, *midi_channels(score.parts)], -1):
        if k >= 0:
            part = score.parts[k]
            name = mido.MetaMessage("track_name", name=part.name or part.instrument)
            program = mido.Message("program_change", channel=channel, program=part.program % 128)
            events = [(0, -2, name), (0, -1, program)]
        for onset, _, pitch, duration, velocity in score.notes[score.notes[:, PART] == k].tolist():
            note = dict(channel=channel, note=pitch)
            events.append((onset, 200 + pitch, mido.Message("note_on", velocity=velocity, **note)))
            events.append((onset + duration, pitch, mido.Message("note_off", velocity=0, **note)))
        track, now = mido.MidiTrack(), 0
        for tick, _, message in sorted(events, key=lambda e: e[:2]):
            track.append(message.copy(time=tick - now))
            now = tick
        track.append(mido.MetaMessage("end_of_track", time=max(0, end - now)))
        file.tracks.append(track)
    file.save(file=(out := io.BytesIO()))
    return out.getvalue()


@tries(100)
@given(scores(), st.sampled_from([(), ((0, "la"), (7, "l'été ♪"), (7, "x" * 200))]))
def test_what_is_written_is_what_mido_writes(score, texts):
    "Byte for byte; mido builds one event after another."
    score = replace(score, ticks=TICKS, texts=texts)
    assert write_midi(score) == mido_bytes(score)


WILD = st.integers(-(2**31), 2**31 - 1)


@tries(150)
@given(
    scores(),
    st.tuples(st.sampled_from([ONSET, PITCH, DURATION, VELOCITY]), WILD),
    st.tuples(WILD, WILD, WILD),
    st.text(st.characters(), max_size=5),
)
def test_no_broken_file_is_written(score, note, wild, words):
    "A score that MIDI cannot hold is rejected; what is written can be read."
    notes = score.notes.copy()
    if len(notes):
        notes[0, note[0]] = note[1]
    tempos, metres = np.array([[0, wild[0]]]), np.array([[0, wild[1] % 300, wild[2] % 300]])
    if not metres[0, 1] or not metres[0, 2]:
        return
    for change in (
        dict(notes=notes[np.lexsort((notes[:, PITCH], notes[:, PART], notes[:, ONSET]))]),
        dict(tempos=tempos),
        dict(metres=metres),
        dict(texts=((0, words),)),
        dict(keys=np.array([[0, wild[0] % 40 - 20, wild[1] % 3]])),
    ):
        try:
            data = write_midi(replace(score, **change))
        except Rejection as e:
            assert "\n" not in str(e)
        else:
            try:
                assert read_midi(data, repairs := []) and not repairs, repairs
            except Rejection as e:
                assert "limit" in e.sentence


# Random bytes. They are read in another process, so that its death is seen, and in this one, too.

READER = """
import json, sys
from musicgen.core import Rejection
from musicgen.music.midi import read_midi
from musicgen.music.score import Score
for line in sys.stdin:
    data = bytes.fromhex(line)
    try:
        score = read_midi(data)
        assert isinstance(score, Score) and score == read_midi(data)
        result = "score"
    except Rejection as e:
        result = "rejection" if e.sentence and "\\n" not in str(e) else "many lines"
    except BaseException as e: result = f"{type(e).__name__}: {e}"
    print(json.dumps(result), flush=True)
"""


def read_apart(batch: list[bytes]) -> list[str]:
    "The result of reading each: score, rejection, killed, or the name of another exception."
    results, left = [], list(batch)
    while left:
        lines = "\n".join(data.hex() for data in left) + "\n"
        done = subprocess.run(
            [sys.executable, "-c", READER], input=lines, text=True, timeout=120, capture_output=True
        )
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(left) or done.returncode < 0, done.stderr
        results += answers + ["killed"] * (len(answers) < len(left))
        left = left[len(answers) + 1 :]
    return results


def mutants(number: int, seed: int = 5) -> list[bytes]:
    "Good files with bytes changed, cut out, doubled, or cut off."
    rng = np.random.default_rng(seed)
    notes = [(120 * k, k % 3, 48 + k % 24, 100, 64 + k % 32) for k in range(48)]
    good = write_midi(make_score(notes, [40, 42, DRUMS], keys=[(0, 2, 0)], texts=((0, "la la"),)))
    broken = []
    for k in range(number):
        data = bytearray(good)
        for _ in range(rng.integers(1, 6)):
            at, long = int(rng.integers(len(data))), int(rng.integers(1, 9))
            what = rng.integers(4) if k % 3 else 0
            if what == 0:
                data[at] = int(rng.integers(256))
            elif what == 1:
                del data[at : at + long]
            elif what == 2:
                data[at:at] = data[at : at + long]
            else:
                data[at : at + long] = rng.bytes(long)
        if k % 7 == 0:
            del data[int(rng.integers(len(data))) :]
        broken.append(bytes(data))
    return broken


def noise(number: int, seed: int = 6) -> list[bytes]:
    "Random bytes, bare and behind the head of a MIDI file."
    rng = np.random.default_rng(seed)
    heads = [
        b"",
        b"MThd",
        bytes.fromhex("4d546864 00000006 0001 0001 01e0 4d54726b 00000040"),
        b"RIFF\x40\0\0\0RMIDdata\x40\0\0\0MThd",
    ]
    return [heads[k % 4] + rng.bytes(int(rng.integers(0, 90))) for k in range(number)]


@pytest.fixture(scope="module")
def readings() -> list[tuple[bytes, str]]:
    batch = mutants(700) + noise(300)
    return list(zip(batch, read_apart(batch), strict=True))


def test_bytes_give_a_score_or_a_rejection(readings):
    "And nothing else: no other exception, and no dead process."
    others = sorted({result for _, result in readings} - {"score", "rejection"})
    assert not others, [(result, data.hex()) for data, result in readings if result in others][:3]
    counts = Counter(result for _, result in readings)
    assert counts["score"] > 400 and counts["rejection"] > 100, counts


# Each of these ends the interpreter when symusic parses it as it is.
KILLERS = [
    "4d546864 00000006 0001 0001 01e0 4d54726b 00000012 0a9f817f728d16fa059b52cbaf6de948c02b",
    "4d546864 00000006 0000 0001 01e0 4d54726b 00000008 019f803e 00ff2f00",  # 80: a pitch
    "4d546864 00000006 0000 0001 01e0 4d54726b 0000ffff 00903c5a 00ff2f00",  # ffff: a length
    "4d546864 00000006 0000 0001 0000 4d54726b 00000008 00903c5a 00ff2f00",
]  # 0000: ticks


def test_what_kills_a_parser_is_read_here():
    "In this very process; the repairs and the number of tracks are right."
    for killer in map(bytes.fromhex, KILLERS):
        repairs = []
        assert isinstance(read_midi(killer, repairs), Score) and repairs
        assert midi_shape(killer)[1] == 1


PIECES = [
    write_midi(
        make_score(
            [(120 * k, k % 3, 48 + k % 24, 100, 64) for k in range(24)],
            [40, 42, DRUMS],
            texts=((0, "la la"),),
        )
    )
]


@tries(400)
@given(
    st.lists(
        st.one_of(st.binary(max_size=24), st.tuples(st.integers(0, 900), st.integers(0, 900))),
        min_size=1,
        max_size=6,
    )
)
def test_spliced_bytes_are_read_here(cuts):
    "Pieces of a good file and of noise, put together after a good header."
    good = PIECES[0]
    data = good[:14] + b"".join(c if isinstance(c, bytes) else good[min(c) : max(c)] for c in cuts)
    try:
        score = read_midi(data)
    except Rejection as e:
        assert e.sentence and "\n" not in str(e)
    else:
        assert isinstance(score, Score) and score == read_midi(data)
        assert (score.notes[:, (DURATION, VELOCITY)] > 0).all() and (score.notes >= 0).all()


def test_the_scan_survives_every_byte(readings, tmp_path):
    "Each file has one row, and a good file is not rejected."
    from musicgen.corpus.readers import scan_files

    batch = dict([*readings[::9], *((bytes.fromhex(k), "score") for k in KILLERS)])
    expected = {}
    for k, (data, result) in enumerate(batch.items()):
        path = tmp_path / f"{k}.mid"
        path.write_bytes(data)
        expected[path] = result
    rows = dict(scan_files(expected, workers=1))
    assert rows.keys() == expected.keys()
    for path, kind in expected.items():
        row = rows[path]
        assert ("reason" in row) != ("notes" in row)
        if kind == "rejection":
            assert row["reason"] and "\n" not in row["reason"]
        if "reason" in row:
            assert "crashed" not in row["reason"], path


# Random requests.


def untrained(folder, seed: int):
    "A loaded model with random weights; the larger the seed, the larger the weights."
    import torch

    from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig, save_model

    layout = Layout(folder / str(seed))
    torch.manual_seed(seed)
    model = MusicLSTM(MusicLSTMConfig(hidden=24, head=16, sources=("example",)))
    for p in model.parameters():
        p.data *= 1 + 2 * seed
    save_model(model, layout.model)
    return open_model(layout)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [untrained(tmp_path_factory.mktemp("models"), seed) for seed in range(3)]


INSTRUMENTS = st.one_of(
    st.sampled_from(["drums", "Piano", "strings", "tuba", "glockenspiel", "timpani"]),
    st.sampled_from(GM),
    st.integers(0, 127),
)


@st.composite
def requests(draw) -> dict:
    "The fields of a request that is within its limits."
    num, den = draw(METRES)
    most = 3 if num / den > 1.5 else 5
    return dict(
        instruments=draw(
            st.lists(INSTRUMENTS, min_size=1, max_size=draw(st.sampled_from([3, 16])))
        ),
        bars=draw(st.integers(1, most)),
        tempo=draw(st.floats(30, 300)),
        time_signature=f"{num}/{den}",
        key=draw(st.sampled_from(["", "D minor", "Bb major"])),
        density=draw(st.sampled_from([0, 0.5, 4, 32])),
        style=draw(st.sampled_from(["", "example"])),
        temperature=draw(st.sampled_from([0, 0.5, 1, 2])),
        top_p=draw(st.floats(0.05, 1)),
        min_p=draw(st.floats(0, 0.5)),
        seed=draw(st.integers(0, 2**31 - 1)),
        takes=draw(st.sampled_from([1, 1, 1, 2])),
    )


@tries(30)
@given(requests(), st.integers(0, 2))
@example(dict(instruments=["drums"], bars=1, time_signature="1/16"), 2)
@example(dict(instruments=["tubular bells"] * 16, bars=1, time_signature="1/16", temperature=2), 1)
@example(dict(instruments=["drums", "drums"], bars=64, time_signature="1/16", temperature=0), 0)
def test_takes_are_what_is_requested(models, fields, which):
    "Parts, bars, tempo, metre, clean notes, a receipt: for any request and any model."
    request = Request.from_dict(json.loads(json.dumps(fields)))
    takes = generate(models[which], request)
    assert len(takes) == request.takes
    for take in takes:
        keeps_its_promises(take, request)
    assert regenerate(models[which], takes[-1].midi).midi == takes[-1].midi
    assert verify(takes[0].midi, models[which])["verdict"] == "ours, untouched"


def keeps_its_promises(take, request: Request):
    score = read_midi(take.midi)
    assert [p.program for p in score.parts] == request.programs, "every part is heard, in its order"
    assert score.metre == request.metre and len(score.metres) == len(score.tempos) == 1
    assert math.isclose(score.bpm, request.tempo, rel_tol=1e-4)
    assert len(score.bar_lines()) - 1 == request.bars
    bar = 4 * 480 * request.metre[0] // request.metre[1]
    assert score.end <= bar * request.bars, "nothing after the last bar line"
    assert score.notes[:, ONSET].max() >= bar * (request.bars - 1), "the last bar has music"
    assert lint(score) == [] == take.report["lint"] and (score.notes[:, DURATION] > 0).all()
    assert read_by_others(take.midi) == (len(score.notes), request.programs)


def read_by_others(data: bytes) -> tuple[int, list[int]]:
    "The number of notes that mido finds, and the programs that pretty_midi finds."
    import mido
    import pretty_midi

    file = mido.MidiFile(file=io.BytesIO(data))
    assert file.type == 1 and file.ticks_per_beat == 480
    notes = [m for track in file.tracks for m in track if m.type == "note_on" and m.velocity]
    pretty = pretty_midi.PrettyMIDI(io.BytesIO(data))
    assert all(
        m.channel == 9
        for i, t in enumerate(file.tracks)
        for m in t
        if m.type == "note_on" and t.name.startswith("Drums")
    )
    return len(notes), [DRUMS if i.is_drum else i.program for i in pretty.instruments]


@tries(40)
@given(requests())
def test_a_request_survives_its_own_text(fields):
    "Through a dictionary, JSON and text, as every entry point does it."
    request = Request.from_dict(fields)
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    texts = {
        k: ",".join(map(str, v)) if isinstance(v, list) else str(v)
        for k, v in request.to_dict().items()
    }
    assert Request.from_dict(texts) == request


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=20),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
NAMES = st.one_of(st.sampled_from([f["name"] for f in Request.spec()]), st.text(max_size=12))


@tries(400)
@given(st.one_of(JUNK, st.dictionaries(NAMES, JUNK, min_size=1, max_size=3)))
@example({"tempo": "1e400"})
@example({"seed": 2**31})
@example({"instruments": "\x00\n\ud800"})
@example({"time_signature": "٣/٤"})
@example({"time_signature": "²/4"})
@example({"bars": "1_0"})
@example({"key": "\n"})
@example({"bars": 10**400})
def test_nonsense_is_rejected_in_one_sentence(given_):
    "Or it is a request within its limits; never another exception, never many lines."
    try:
        request = Request.from_dict(given_)
    except Rejection as e:
        assert 10 < len(e.sentence) < 400 and "\n" not in str(e), str(e)
        e.sentence.encode()
    else:
        for field in Request.spec():
            value = getattr(request, field["name"])
            if field["type"] in ("int", "float"):
                assert field["low"] <= value <= field["high"]
        assert 1 <= len(request.programs) <= 16


@functools.lru_cache
def limits() -> list[tuple[str, float]]:
    "Every number just outside its limits."
    step = dict(int=1, float=1e-6)
    return [
        (f["name"], edge + way * step[f["type"]])
        for f in Request.spec()
        if f["type"] in step
        for edge, way in ((f["low"], -1), (f["high"], 1))
    ]


@pytest.mark.parametrize("name,value", limits())
def test_a_limit_is_a_limit(name, value):
    inside = {f["name"]: (f["low"], f["high"]) for f in Request.spec()}[name]
    for edge in inside:
        assert getattr(Request(**{name: edge}), name) == edge
    with pytest.raises(Rejection, match=f"{name}.*{re.escape(str(inside[1]))}"):
        Request.from_dict({name: value})


def test_an_edited_bar_is_named(models):
    "A note moved in a random bar of a random take: that bar, and no other."
    rng = np.random.default_rng(3)
    for seed in range(6):
        request = Request(bars=6, seed=seed, instruments=["piano", "flute"])
        take = generate(models[seed % 3], request)[0]
        notes = take.score.notes.copy()
        row = int(rng.integers(len(notes)))
        notes[row, 4] = notes[row, 4] % 127 + 1
        report = verify(write_midi(replace(take.score, notes=notes)))
        assert report["verdict"] == "ours, edited"
        assert report["bars"] == [1 + notes[row, ONSET] // 1920]
