"""Pictures, samples and sheet music of unusual scores."""

import io
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from musicgen.core import Rejection
from musicgen.music import audio as hearing
from musicgen.music.audio import AUDIO, PEAK, TAIL, encode_audio, find_soundfont, stems, synthesize
from musicgen.music.instruments import DRUMS
from musicgen.music.midi import read_midi
from musicgen.music.process import WorkerProcess
from musicgen.music.roll import plot_roll, roll_png
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
        sound = hearing._play_apart(job_of(8, 108), timeout=1)
    except Rejection as refusal:
        assert "no sound after 1 s" in str(refusal)
    else:
        assert np.isfinite(sound).all()
    assert synthesize(tune(8, 108)).any(), "the service plays on, and the score itself is playable"


def test_a_dead_process_is_replaced():
    first = synthesize(tune())
    hearing._synthesizer.process.kill()
    assert np.array_equal(first, synthesize(tune()))


def test_a_process_that_always_dies_is_refused(monkeypatch):
    monkeypatch.setattr(hearing, "_synthesizer", WorkerProcess("sys:exit"))
    with pytest.raises(Rejection, match="crashed twice"):
        synthesize(tune())


@pytest.mark.parametrize("program", [78, 83, 95, 101])
def test_what_was_played_before_does_not_matter(program):
    "These programs share samples with others, or read beyond them."
    first = synthesize(tune(program))
    for other in (program - 1, program + 1, 82, 62):
        synthesize(tune(other, 70))
    assert np.array_equal(first, synthesize(tune(program)))
    hearing._synthesizer.close()
    assert np.array_equal(first, synthesize(tune(program)))
    assert np.isfinite(first).all() and 0.9 < np.abs(first).max() <= PEAK + 1e-6


def test_threads_get_their_own_sound():
    scores = [tune(p, bars=1) for p in (0, 40, 73, 56)]
    alone, together = [synthesize(s) for s in scores], [None] * 4

    def play(k):
        together[k] = synthesize(scores[k])

    threads = [threading.Thread(target=play, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(map(np.array_equal, alone, together))


@pytest.mark.parametrize("size", [0, 4, 5000, 200_000])
def test_a_broken_soundfont_is_one_sentence(size, tmp_path):
    "Cut off at any place it is rejected, or what is left of it plays."
    broken = tmp_path / "broken.sf2"
    broken.write_bytes(find_soundfont().read_bytes()[:size])
    try:
        sound = synthesize(tune(), broken)
    except Rejection as rejection:
        assert "broken.sf2" in str(rejection) and "\n" not in str(rejection)
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
    archive = zipfile.ZipFile(io.BytesIO(stems(score, "wav", rate=48000)))
    assert archive.namelist() == [
        f"0{k + 1}-{name}.wav"
        for k, name in enumerate(("grand-piano", "violin", "violin", "church-organ", "kit"))
    ]
    files = [io.BytesIO(archive.read(name)) for name in archive.namelist()]
    sounds = [soundfile.read(file, dtype="float32") for file in files]
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


@pytest.mark.parametrize("bars, parts", [(1, 1), (16, 4), (128, 16)])
def test_a_roll_of_any_size(bars, parts):
    notes = [(480 * k, k % parts, 40 + k * 7 % 50, 400, 90) for k in range(4 * bars)]
    score = make_score(notes, [*range(parts - 1), DRUMS])
    assert roll_png(score, shade_bars=2) == roll_png(score, shade_bars=(1, 2))
    figure = plot_roll(score, dark=True, shade_bars=(bars, bars))
    legend = figure.legends[0].get_texts()
    assert legend[-1].get_text() == (f"bar {bars}" if bars > 1 else "opening")
    rectangles = [axes.collections[-1] for axes in figure.axes]
    colours = {tuple(face[:3]) for notes in rectangles for face in notes.get_facecolors()}
    assert len(colours) == parts, "one colour a part"


def test_rolls_drawn_side_by_side_are_the_same():
    "matplotlib's settings are global; four threads draw SVG and PNG at once."
    scores = [tune(program, bars=3) for program in (0, 40, 73, 56)]
    kinds = ["svg", "png", "svg", "pdf"]
    alone = [roll_png(score, kind=kind) for score, kind in zip(scores, kinds, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(roll_png, s, kind=k) for s, k in zip(scores, kinds, strict=True)]
        assert [picture.result() for picture in together] == alone


def quarters(score):
    "Onset, pitch and duration of each note, in quarter notes."
    return sorted((a / score.ticks, p, d / score.ticks) for a, _, p, d, _ in score.notes.tolist())


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8), (5, 8), (2, 2), (12, 8), (9, 16)])
def test_sheet_music_has_the_notes(metre):
    "Voices, chords, ties, triplets, all keys: read back, every note is where it was."
    pytest.importorskip("music21")
    from musicgen.music.musicxml import read_musicxml

    rng, eighth = np.random.default_rng(sum(metre)), 240
    pitches, lengths = rng.permutation(40), rng.integers(1, 4, 40)
    rows = [
        (eighth * k, 0, 48 + int(p), eighth * int(d), 80)
        for k, (p, d) in enumerate(zip(pitches, lengths, strict=True))
    ]
    rows += [
        (eighth * k, 1, p + k % 3, eighth * 3, 80) for k in range(0, 40, 4) for p in (60, 64, 67)
    ]
    if metre[1] == 4:
        rows += [(480 * 20 + 160 * k, 1, 60 + k, 160, 80) for k in range(6)]
    score = make_score(rows, [40, 71], bpm=90, metre=metre, keys=[(0, int(rng.integers(-6, 7)), 0)])
    back = read_musicxml(sheet(score))
    assert back.metre == metre and round(back.bpm) == 90 and back.keys[0, 1] == score.keys[0, 1]
    assert quarters(back) == quarters(score)


def test_sheet_music_of_unusual_scores():
    "Silence, crowded voices, two staves, a kit of unknown drums, a change of metre and of key."
    pytest.importorskip("music21")
    rng = np.random.default_rng(0)
    crowd = [
        (int(a) * 70, 0, int(p), int(d) * 110, 90)
        for a, p, d in rng.integers((0, 0, 1), (60, 128, 20), (120, 3))
    ]
    kit = [(120 * k, 1, 27 + k % 60, 60, 90) for k in range(64)]
    unusual = make_score(
        crowd + kit,
        [Part(0, "<&> \x01"), DRUMS],
        metres=[(0, 7, 8), (3360, 3, 4)],
        keys=[(0, -7, 1), (3360, 7, 0)],
        tempos=[(0, 500000), (3360, 400000)],
    )
    for score in (unusual, unusual.header, make_score([(0, 0, 60, 1, 1)])):
        xml = sheet(score)
        assert xml == sheet(score)
        root = ElementTree.fromstring(xml)
        assert len(root.findall("part")) == len(score.parts)
        assert len({len(part) for part in root.findall("part")}) == 1, "as many bars in every part"
    root = ElementTree.fromstring(sheet(unusual))
    assert root.find("part/measure/attributes/staves").text == "2"
    assert "percussion" in {e.text for e in root.iter("sign")}
    assert {int(e.text) - 1 for e in root.iter("midi-unpitched")} == {p for _, _, p, *_ in kit}


def test_sheet_music_as_a_picture():
    pytest.importorskip("music21"), pytest.importorskip("verovio")
    picture = sheet(tune(), "svg")
    assert ElementTree.fromstring(picture).tag.endswith("svg") and picture == sheet(tune(), "svg")


@pytest.mark.parametrize("library, kind", [("music21", "musicxml"), ("verovio", "svg")])
def test_sheet_music_without_its_library(monkeypatch, library, kind):
    "A module that is None in `sys.modules` cannot be imported."
    if library == "verovio":
        pytest.importorskip("music21")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(Rejection, match=rf'needs {library}: pip install "musicgen\[sheet\]"'):
        sheet(tune(), kind)
