"""What nobody would think of: random music, random rows, random bytes, random requests."""

import functools
import io
import json
import math
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
from musicgen.music.score import (
    DRUMS,
    DURATION,
    GM,
    ONSET,
    PART,
    PITCH,
    VELOCITY,
    Part,
    Score,
    _channels,
    lint,
    make_score,
    on_grid,
    read_midi,
    write_midi,
)
from musicgen.music.smf import TICKS, midi_shape
from musicgen.music.tokens import FIELDS, Vocab, decode, encode


def tries(number: int):
    "The same examples on every machine and every day, as slow as they like."
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
                lambda found: [(t, *metre) for t, metre in found]
            )
        ),
    ]
    notes = draw(st.lists(note, max_size=40))
    return make_score(notes, parts, ticks=ticks, tempos=tempos, metres=metres)


VOCABS = st.sampled_from([Vocab(), Vocab(grid=12, longest=48), Vocab(grid=4, longest=7)])


@tries(150)
@given(scores(), VOCABS)
def test_rows_hold_the_score_on_the_grid(score, vocab):
    "The law of the tokens: decode(encode(x)) == on_grid(x); and twice is the same as once."
    rows, straight = encode(score, vocab), on_grid(score, vocab.grid)
    assert rows.dtype == np.uint8 and rows.shape[1:] == (len(FIELDS),)
    assert (rows < np.array(vocab.sizes)).all()
    back = decode(rows, score, vocab)
    assert back == straight
    assert on_grid(straight, vocab.grid) == straight and np.array_equal(encode(back, vocab), rows)
    assert not [problem for problem in lint(back) if "never heard" not in problem]


@tries(100)
@given(scores(), st.sampled_from([4, 24, 480]))
def test_the_grid_moves_nothing_by_more_than_half_a_step(score, grid):
    "Onsets and ends; but a note has a step at least, and ends where its pitch is struck again."
    step = lambda tick: (2 * tick * grid + score.ticks) // (2 * score.ticks)
    struck = {}
    for onset, part, pitch, long, _ in score.notes.tolist():
        for tick in (onset, onset + long):
            assert abs(step(tick) * score.ticks - tick * grid) * 2 <= score.ticks
        ends = struck.setdefault((part, pitch), {})
        ends[step(onset)] = max(step(onset) + 1, step(onset + long), ends.get(step(onset), 0))
    kept = {
        (part, pitch, at): at + long
        for at, part, pitch, long, _ in on_grid(score, grid).notes.tolist()
    }
    for voice, ends in struck.items():
        for at, end in ends.items():
            again = min((other for other in ends if other > at), default=end)
            assert kept.pop((*voice, at)) == min(end, again)
    assert not kept


def rows_of(vocab: Vocab):
    "Rows that a model could come up with, sense or none."
    return st.lists(st.tuples(*(st.integers(0, size - 1) for size in vocab.sizes)), max_size=40)


@tries(150)
@given(rows_of(Vocab()), PARTS)
def test_any_rows_decode(rows, parts):
    "Whatever a model says, the score is clean, and says the same when it is read aloud."
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
    "On the grid, a file holds parts, notes, tempi and metres as they were."
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


def by_mido(score: Score) -> bytes:
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
    for k, channel in enumerate([0, *_channels(score.parts)], -1):
        if k >= 0:
            part = score.parts[k]
            name = mido.MetaMessage("track_name", name=part.name or part.instrument)
            program = mido.Message("program_change", channel=channel, program=part.program % 128)
            events = [(0, -2, name), (0, -1, program)]
        for onset, _, pitch, long, loud in score.notes[score.notes[:, PART] == k].tolist():
            note = dict(channel=channel, note=pitch)
            events.append((onset, 200 + pitch, mido.Message("note_on", velocity=loud, **note)))
            events.append((onset + long, pitch, mido.Message("note_off", velocity=0, **note)))
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
    "Byte for byte: the witness builds one event after another."
    score = replace(score, ticks=TICKS, texts=texts)
    assert write_midi(score) == by_mido(score)


WILD = st.integers(-(2**31), 2**31 - 1)


@tries(150)
@given(
    scores(),
    st.tuples(st.sampled_from([ONSET, PITCH, DURATION, VELOCITY]), WILD),
    st.tuples(WILD, WILD, WILD),
    st.text(st.characters(), max_size=5),
)
def test_no_broken_file_is_written(score, note, wild, words):
    "A score that MIDI cannot say is refused; what is written can be read."
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
                assert read_midi(data, said := []) and not said, said
            except Rejection as e:
                assert "limit" in e.sentence


# Random bytes. They are read in this process too; another one is there to tell of a kill.

READER = """
import json, sys
from musicgen.core import Rejection
from musicgen.music.score import Score, lint, read_midi, write_midi
for line in sys.stdin:
    data = bytes.fromhex(line)
    try:
        score = read_midi(data)
        assert isinstance(score, Score) and score == read_midi(data)
        said = "score"
    except Rejection as e: said = "refusal" if e.sentence and "\\n" not in str(e) else "many lines"
    except BaseException as e: said = f"{type(e).__name__}: {e}"
    print(json.dumps(said), flush=True)
"""


def read_apart(batch: list[bytes]) -> list[str]:
    "What reading each of them comes to: score, refusal, killed, or the name of a stray exception."
    said, left = [], list(batch)
    while left:
        lines = "\n".join(data.hex() for data in left) + "\n"
        done = subprocess.run(
            [sys.executable, "-c", READER], input=lines, text=True, timeout=120, capture_output=True
        )
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(left) or done.returncode < 0, done.stderr
        said += answers + ["killed"] * (len(answers) < len(left))
        left = left[len(answers) + 1 :]
    return said


def mutants(number: int, seed: int = 5) -> list[bytes]:
    "Good files with bytes changed, cut out, doubled, or cut off."
    dice = np.random.default_rng(seed)
    notes = [(120 * k, k % 3, 48 + k % 24, 100, 64 + k % 32) for k in range(48)]
    good = write_midi(make_score(notes, [40, 42, DRUMS], keys=[(0, 2, 0)], texts=((0, "la la"),)))
    made = []
    for k in range(number):
        data = bytearray(good)
        for _ in range(dice.integers(1, 6)):
            at, long = int(dice.integers(len(data))), int(dice.integers(1, 9))
            what = dice.integers(4) if k % 3 else 0
            if what == 0:
                data[at] = int(dice.integers(256))
            elif what == 1:
                del data[at : at + long]
            elif what == 2:
                data[at:at] = data[at : at + long]
            else:
                data[at : at + long] = dice.bytes(long)
        if k % 7 == 0:
            del data[int(dice.integers(len(data))) :]
        made.append(bytes(data))
    return made


def noise(number: int, seed: int = 6) -> list[bytes]:
    "Random bytes, bare and behind the head of a MIDI file."
    dice = np.random.default_rng(seed)
    heads = [
        b"",
        b"MThd",
        bytes.fromhex("4d546864 00000006 0001 0001 01e0 4d54726b 00000040"),
        b"RIFF\x40\0\0\0RMIDdata\x40\0\0\0MThd",
    ]
    return [heads[k % 4] + dice.bytes(int(dice.integers(0, 90))) for k in range(number)]


@pytest.fixture(scope="module")
def readings() -> list[tuple[bytes, str]]:
    batch = mutants(700) + noise(300)
    return list(zip(batch, read_apart(batch), strict=True))


def test_bytes_give_a_score_or_a_refusal(readings):
    "And nothing else: no other exception, and no dead process."
    stray = sorted({said for _, said in readings} - {"score", "refusal"})
    assert not stray, [(said, data.hex()) for data, said in readings if said in stray][:3]
    counts = Counter(said for _, said in readings)
    assert counts["score"] > 400 and counts["refusal"] > 100, counts


# The parser that symusic is kills the interpreter over each of these.
KILLERS = [
    "4d546864 00000006 0001 0001 01e0 4d54726b 00000012 0a9f817f728d16fa059b52cbaf6de948c02b",
    "4d546864 00000006 0000 0001 01e0 4d54726b 00000008 019f803e 00ff2f00",  # 80: a pitch
    "4d546864 00000006 0000 0001 01e0 4d54726b 0000ffff 00903c5a 00ff2f00",  # ffff: a length
    "4d546864 00000006 0000 0001 0000 4d54726b 00000008 00903c5a 00ff2f00",
]  # 0000: ticks


def test_what_kills_a_parser_is_read_here():
    "In this very process, and the shape of it is told."
    for killer in map(bytes.fromhex, KILLERS):
        said = []
        assert isinstance(read_midi(killer, said), Score) and said
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
    "Shreds of a good file and of noise, glued together behind a good head."
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
    "Of files good and bad each has one row; the good are not blamed."
    from musicgen.corpus.readers import scan_files

    batch = dict([*readings[::9], *((bytes.fromhex(k), "score") for k in KILLERS)])
    expected = {}
    for k, (data, said) in enumerate(batch.items()):
        path = tmp_path / f"{k}.mid"
        path.write_bytes(data)
        expected[path] = said
    rows = dict(scan_files(expected, workers=1))
    assert rows.keys() == expected.keys()
    for path, kind in expected.items():
        row = rows[path]
        assert ("reason" in row) != ("notes" in row)
        if kind == "refusal":
            assert row["reason"] and "\n" not in row["reason"]
        if "reason" in row:
            assert "crashed" not in row["reason"], path


# Random requests.


def untrained(folder, seed: int):
    "A studio whose model has learnt nothing."
    import torch

    from musicgen.model.files import save_model
    from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig

    layout = Layout(folder / str(seed))
    torch.manual_seed(seed)
    model = MusicLSTM(MusicLSTMConfig(hidden=24, head=16, sources=("lesson",)))
    for p in model.parameters():
        p.data *= 1 + 2 * seed
    save_model(model, layout.model)
    return open_model(layout)


@pytest.fixture(scope="module")
def studios(tmp_path_factory):
    return [untrained(tmp_path_factory.mktemp("studios"), seed) for seed in range(3)]


PLAYERS = st.one_of(
    st.sampled_from(["drums", "Piano", "strings", "tuba", "glockenspiel", "timpani"]),
    st.sampled_from(GM),
    st.integers(0, 127),
)


@st.composite
def wishes(draw) -> dict:
    "A request that is within its limits."
    num, den = draw(METRES)
    most = 3 if num / den > 1.5 else 5
    return dict(
        instruments=draw(st.lists(PLAYERS, min_size=1, max_size=draw(st.sampled_from([3, 16])))),
        bars=draw(st.integers(1, most)),
        tempo=draw(st.floats(30, 300)),
        time_signature=f"{num}/{den}",
        key=draw(st.sampled_from(["", "D minor", "Bb major"])),
        density=draw(st.sampled_from([0, 0.5, 4, 32])),
        style=draw(st.sampled_from(["", "lesson"])),
        temperature=draw(st.sampled_from([0, 0.5, 1, 2])),
        top_p=draw(st.floats(0.05, 1)),
        min_p=draw(st.floats(0, 0.5)),
        seed=draw(st.integers(0, 2**31 - 1)),
        takes=draw(st.sampled_from([1, 1, 1, 2])),
    )


@tries(30)
@given(wishes(), st.integers(0, 2))
@example(dict(instruments=["drums"], bars=1, time_signature="1/16"), 2)
@example(dict(instruments=["tubular bells"] * 16, bars=1, time_signature="1/16", temperature=2), 1)
@example(dict(instruments=["drums", "drums"], bars=64, time_signature="1/16", temperature=0), 0)
def test_a_request_is_kept(studios, wish, which):
    "Parts, bars, tempo, metre, clean notes, a receipt: whatever is asked of whatever model."
    request = Request.from_dict(json.loads(json.dumps(wish)))
    takes = generate(studios[which], request)
    assert len(takes) == request.takes
    for take in takes:
        keeps_its_promises(take, request)
    assert regenerate(studios[which], takes[-1].midi).midi == takes[-1].midi
    assert verify(takes[0].midi, studios[which])["verdict"] == "ours, untouched"


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
    "The notes that mido counts; the programs that pretty_midi hears."
    import mido
    import pretty_midi

    file = mido.MidiFile(file=io.BytesIO(data))
    assert file.type == 1 and file.ticks_per_beat == 480
    notes = [m for track in file.tracks for m in track if m.type == "note_on" and m.velocity]
    heard = pretty_midi.PrettyMIDI(io.BytesIO(data))
    assert all(
        m.channel == 9
        for i, t in enumerate(file.tracks)
        for m in t
        if m.type == "note_on" and t.name.startswith("Drums")
    )
    return len(notes), [DRUMS if i.is_drum else i.program for i in heard.instruments]


@tries(40)
@given(wishes())
def test_a_request_survives_its_own_words(wish):
    "Through a dictionary, JSON and text, as every door does it."
    request = Request.from_dict(wish)
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
def test_nonsense_is_refused_in_one_sentence(given_):
    "Or it is a request within its limits; never another exception, never a page."
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
    with pytest.raises(Rejection) as refused:
        Request.from_dict({name: value})
    assert name in refused.value.sentence and str(inside[1]) in refused.value.sentence


def test_an_edited_bar_is_named(studios):
    "A note moved in a random bar of a random take: that bar, and no other."
    dice = np.random.default_rng(3)
    for seed in range(6):
        request = Request(bars=6, seed=seed, instruments=["piano", "flute"])
        take = generate(studios[seed % 3], request)[0]
        notes = take.score.notes.copy()
        row = int(dice.integers(len(notes)))
        notes[row, 4] = notes[row, 4] % 127 + 1
        found = verify(write_midi(replace(take.score, notes=notes)))
        assert found["verdict"] == "ours, edited"
        assert found["bars"] == [1 + notes[row, ONSET] // 1920]
