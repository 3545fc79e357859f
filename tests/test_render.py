"""Seeing, hearing and reading: pictures, samples and sheet music of scores nobody would write."""

import io
import threading
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from musicgen.core import Rejection
from musicgen.music import audio as hearing
from musicgen.music import sheet as sheet_room
from musicgen.music.audio import AUDIO, PEAK, TAIL, encode_audio, find_soundfont, stems, synthesize
from musicgen.music.roll import plot_roll, roll_png
from musicgen.music.instruments import DRUMS
from musicgen.music.midi import read_midi
from musicgen.music.score import ONSET, PART, PITCH, Part, make_score
from musicgen.music.sheet import sheet


def tune(program=0, top=72, bars=2):
    "Quarter notes down from a pitch, with a bass drum below."
    notes = [(480 * k, 0, top - k % 8, 480, 90) for k in range(4 * bars)]
    return make_score(
        [*notes, *((1920 * k, 1, 36, 120, 110) for k in range(bars))], [program, DRUMS]
    )


def job_of(program, pitch):
    "One note as it is given to the synthesiser: no pitch is brought down."
    notes = make_score([(0, 0, pitch, 240, 100)]).notes
    return dict(
        soundfont=str(find_soundfont()),
        rate=44100,
        ticks=480,
        tempos=[(0, 500000)],
        frames=44100,
        voices=[(program, False, notes)],
    )


def test_a_note_that_never_ends_is_given_up():
    "The celesta's 108 makes symusic 0.5.8 run for ever; should that be mended, nothing is refused."
    try:
        sound = hearing._perform(job_of(8, 108), patience=1)
    except Rejection as refusal:
        assert "no sound after 1 s" in str(refusal)
    else:
        assert np.isfinite(sound).all()
    assert synthesize(tune(8, 108)).any(), "the service plays on, and the score itself is playable"


def test_a_dead_process_is_replaced():
    first = synthesize(tune())
    hearing._band.process.kill()
    assert np.array_equal(first, synthesize(tune()))


def test_a_process_that_always_dies_is_refused(monkeypatch):
    monkeypatch.setattr(hearing._band, "ask", lambda patience, job: ("", None))
    with pytest.raises(Rejection, match="crashed twice"):
        synthesize(tune())


@pytest.mark.parametrize("program", [78, 83, 95, 101])
def test_what_was_played_before_does_not_matter(program):
    "These programs share samples with others, or read beyond them."
    first = synthesize(tune(program))
    for other in (program - 1, program + 1, 82, 62):
        synthesize(tune(other, 70))
    assert np.array_equal(first, synthesize(tune(program)))
    hearing._band.stop()
    assert np.array_equal(first, synthesize(tune(program)))
    assert np.isfinite(first).all() and 0.9 < np.abs(first).max() <= PEAK + 1e-6


def test_threads_get_their_own_sound():
    scores = [tune(p, bars=1) for p in (0, 40, 73, 56)]
    alone, found = [synthesize(s) for s in scores], [None] * 4

    def play(k):
        found[k] = synthesize(scores[k])

    threads = [threading.Thread(target=play, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(map(np.array_equal, alone, found))


@pytest.mark.parametrize("kept", [0, 4, 5000, 200_000])
def test_a_broken_soundfont_is_one_sentence(kept, tmp_path):
    "Cut off at any place it is refused, or what is left of it plays."
    broken = tmp_path / "broken.sf2"
    broken.write_bytes(find_soundfont().read_bytes()[:kept])
    try:
        sound = synthesize(tune(), broken)
    except Rejection as refusal:
        assert "broken.sf2" in str(refusal) and "\n" not in str(refusal)
    else:
        assert np.isfinite(sound).all()
    with pytest.raises(Rejection, match="is not a file"):
        synthesize(tune(), tmp_path / "none.sf2")
    assert synthesize(tune()).any()


def test_loud_and_silent_samples_are_written_as_they_are():
    loud = np.array([[2.0, -2.0, 0.5, np.nan], [1.0, -1.0, 0.0, 0.0]], np.float32).repeat(4000, 1)
    for kind in ("flac", "wav"):
        back, _ = soundfile.read(io.BytesIO(encode_audio(loud, kind)))
        assert np.abs(back.T[:, :8000]).min() > 0.999 and not back[12000:].any()
        assert np.array_equal(np.sign(back.T[:, :8000]), np.sign(loud[:, :8000])), (
            "nothing wraps round"
        )
    magic = {kind: encode_audio(synthesize(tune()), kind)[:3] for kind in AUDIO}
    assert (
        magic["flac"] == b"fLa"
        and magic["wav"] == b"RIF"
        and (magic["mp3"] == b"ID3" or magic["mp3"][0] == 255)
    )


def test_stems_add_up_and_know_the_bars():
    score = make_score(
        [(240 * k, k % 5, 50 + k % 20, 200, 60 + k) for k in range(60)],
        [
            Part(0, "Grand / Piano"),
            Part(40, "Violin"),
            Part(40, "Violin"),
            Part(19),
            Part(DRUMS, "Kit"),
        ],
        bpm=96,
        metre=(3, 4),
    )
    box = zipfile.ZipFile(io.BytesIO(stems(score, "wav", rate=48000)))
    assert box.namelist() == [
        f"0{k + 1}-{name}.wav"
        for k, name in enumerate(("grand-piano", "violin", "violin", "church-organ", "kit"))
    ]
    sounds = [soundfile.read(io.BytesIO(box.read(n)), dtype="float32") for n in box.namelist()]
    assert {(rate, len(x)) for x, rate in sounds} == {
        (48000, round((score.seconds + TAIL) * 48000))
    }
    mix, total = synthesize(score, rate=48000), sum(x.T for x, _ in sounds)
    gain = float((total * mix).sum() / (mix * mix).sum())
    assert 0.5 < gain <= 1.001 and np.abs(total - gain * mix).max() < 5 / 32768
    assert stems(score, "wav", rate=48000) == stems(score, "wav", rate=48000)
    midi = zipfile.ZipFile(io.BytesIO(stems(score, "mid")))
    for k, name in enumerate(midi.namelist()):
        part, rows = read_midi(midi.read(name)), score.notes[score.notes[:, PART] == k]
        assert part.metre == (3, 4) and round(part.bpm) == 96
        assert np.array_equal(part.notes[:, [ONSET, PITCH]], rows[:, [ONSET, PITCH]])


@pytest.mark.parametrize("bars,parts", [(1, 1), (16, 4), (128, 16)])
def test_a_roll_of_any_size(bars, parts):
    notes = [(480 * k, k % parts, 40 + k * 7 % 50, 400, 90) for k in range(4 * bars)]
    score = make_score(notes, [*range(parts - 1), DRUMS])
    assert roll_png(score, shade_bars=2) == roll_png(score, shade_bars=(1, 2))
    figure = plot_roll(score, dark=True, shade_bars=(bars, bars))
    assert figure.legends[0].get_texts()[-1].get_text() == (
        f"bar {bars}" if bars > 1 else "opening"
    )
    colours = {
        tuple(axes.collections[-1].get_facecolors()[k][:3])
        for axes in figure.axes
        for k in range(len(axes.collections[-1].get_facecolors()))
    }
    assert len(colours) == parts, "one colour per part"


def written(score):
    "Onset, pitch and duration of each note, in quarter notes."
    return sorted((a / score.ticks, p, d / score.ticks) for a, _, p, d, _ in score.notes.tolist())


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8), (5, 8), (2, 2), (12, 8), (9, 16)])
def test_sheet_music_says_the_notes(metre):
    "Voices, chords, ties over bar lines, triplets, all keys: read back, every note is where it was."
    pytest.importorskip("music21")
    from musicgen.music.musicxml import read_musicxml

    rng, eighth = np.random.default_rng(sum(metre)), 240
    rows = [
        (eighth * int(k), 0, 48 + int(p), eighth * int(d), 80)
        for k, p, d in zip(np.arange(40), rng.permutation(40), rng.integers(1, 4, 40), strict=True)
    ]
    rows += [
        (eighth * k, 1, p + k % 3, eighth * 3, 80) for k in range(0, 40, 4) for p in (60, 64, 67)
    ]
    if metre[1] == 4:
        rows += [(480 * 20 + 160 * k, 1, 60 + k, 160, 80) for k in range(6)]
    score = make_score(rows, [40, 71], bpm=90, metre=metre, keys=[(0, int(rng.integers(-6, 7)), 0)])
    back = read_musicxml(sheet(score))
    assert back.metre == metre and round(back.bpm) == 90 and back.keys[0, 1] == score.keys[0, 1]
    assert written(back) == written(score)


def test_sheet_music_of_odd_scores():
    "Silence, a crowd in one part, two hands, a kit with drums nobody knows, a change of metre and key."
    pytest.importorskip("music21")
    rng = np.random.default_rng(0)
    crowd = [
        (int(a) * 70, 0, int(p), int(d) * 110, 90)
        for a, p, d in rng.integers((0, 0, 1), (60, 128, 20), (120, 3))
    ]
    kit = [(120 * k, 1, 27 + k % 60, 60, 90) for k in range(64)]
    odd = make_score(
        crowd + kit,
        [Part(0, "<&> \x01"), DRUMS],
        metres=[(0, 7, 8), (3360, 3, 4)],
        keys=[(0, -7, 1), (3360, 7, 0)],
        tempos=[(0, 500000), (3360, 400000)],
    )
    for score in (odd, odd.header, make_score([(0, 0, 60, 1, 1)])):
        xml = sheet(score)
        assert xml == sheet(score)
        root = ElementTree.fromstring(xml)
        assert len(root.findall("part")) == len(score.parts)
        assert len({len(part) for part in root.findall("part")}) == 1, "as many bars in every part"
    root = ElementTree.fromstring(sheet(odd))
    assert root.find("part/measure/attributes/staves").text == "2"
    assert "percussion" in {e.text for e in root.iter("sign")}
    assert {int(e.text) - 1 for e in root.iter("midi-unpitched")} == {p for _, _, p, *_ in kit}


def test_sheet_music_as_a_picture():
    pytest.importorskip("music21"), pytest.importorskip("verovio")
    picture = sheet(tune(), "svg")
    assert ElementTree.fromstring(picture).tag.endswith("svg") and picture == sheet(tune(), "svg")


def test_sheet_music_without_its_library(monkeypatch):
    monkeypatch.setattr(sheet_room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Rejection, match=r'music21: pip install "musicgen\[sheet\]"'):
        sheet(tune())
