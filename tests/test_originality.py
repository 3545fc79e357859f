"""Copies are found in any disguise, new pieces are not accused, the baseline is held-out music."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from musicgen.core import Layout
from musicgen.corpus import dataset
from musicgen.corpus.dataset import write_corpus
from musicgen.model.piece import make_piece
from musicgen.music import passages
from musicgen.music.edit import transpose
from musicgen.music.originality import MIN_EXCERPTS, PASSAGE, OriginalityIndex
from musicgen.music.score import DURATION, ONSET, PART, Part, Score, make_score
from musicgen.music.tokens import Vocab


def random_line(rng: np.random.Generator, notes: int, part: int = 0) -> list[list[int]]:
    "A line of small steps in mixed rhythm, on a grid of 24."
    steps, shares = [-4, -2, -1, 0, 1, 2, 3, 5], [0.1, 0.2, 0.2, 0.1, 0.2, 0.1, 0.05, 0.05]
    walk = np.cumsum(rng.choice(steps, notes, p=shares))
    waits = rng.choice([6, 12, 18, 24, 48], notes, p=[0.2, 0.4, 0.1, 0.2, 0.1])
    pitches, onsets = 60 + np.abs((walk + 12) % 48 - 24), np.cumsum(waits) - waits
    return [
        [int(t), part, int(p), int(d), 80] for t, p, d in zip(onsets, pitches, waits, strict=True)
    ]


def piece(seed: int, notes: int = 60) -> Score:
    "A violin, a viola and a cello, each with a line of its own."
    rng = np.random.default_rng(seed)
    rows = [row for part in range(3) for row in random_line(rng, notes, part)]
    return make_score(rows, [Part(40), Part(41), Part(42)], ticks=24)


def ornament(note: list[int], wait: int, following: int, kind: int) -> list[list[int]]:
    "One note with a passing note, a mordent or a grace note, or at another pitch."
    t, part, p, d, v = note
    if kind == 0:
        half = wait // 2
        return [[t, part, p, half, v], [t + half, part, (p + following) // 2, half, v]]
    if kind == 1:
        return [[t, part, p, 2, v], [t + 2, part, p + 2, 2, v], [t + 4, part, p, wait - 4, v]]
    if kind == 2:
        return [[t, part, p + 1, 2, v], [t + 2, part, p, max(d - 2, 1), v]]
    return [[t, part, p + 2, d, v]]


def ornamented(score: Score, every: int) -> Score:
    "The score with an ornament at every so-many-th note of each part."
    rows = []
    for part in range(len(score.parts)):
        notes = score.notes[score.notes[:, PART] == part].tolist()
        for k, (note, after) in enumerate(zip(notes, notes[1:] + notes[-1:], strict=True)):
            wait = after[0] - note[0]
            here = k % every == every - 1 and wait >= 6
            rows += ornament(note, wait, after[2], k // every % 4) if here else [note]
    return make_score(rows, score.parts, ticks=24)


def stretched(score: Score, factor: float) -> Score:
    "The score at another speed, on the same clock."
    notes = score.notes.astype(float)
    times = [ONSET, DURATION]
    notes[:, times] = np.maximum(np.rint(notes[:, times] * factor), [0, 1])
    return make_score(notes.astype(int).tolist(), score.parts, ticks=24)


def without(score: Score, part: int) -> Score:
    "The score without the notes of a part."
    return make_score(score.notes[score.notes[:, PART] != part].tolist(), score.parts, ticks=24)


@pytest.fixture(scope="module")
def index() -> OriginalityIndex:
    "Sixty pieces."
    return OriginalityIndex.build((f"piece {k}", piece(k)) for k in range(60))


DISGUISES: dict[str, Callable[[Score], Score]] = {
    "another key": lambda s: transpose(s, 5),
    "slower": lambda s: stretched(s, 2),
    "faster": lambda s: stretched(s, 0.5),
    "a quarter slower": lambda s: stretched(s, 1.25),
    "no inner voice": lambda s: without(s, 1),
    "ornament at every 8th": lambda s: ornamented(s, 8),
    "ornament at every 7th": lambda s: ornamented(s, 7),
    "all": lambda s: ornamented(transpose(stretched(without(s, 1), 2), -3), 8),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_a_copy_is_found(index, name):
    "Twenty pieces in disguise; nineteen or all of them are traced to where they come from."
    reports = [index.report(DISGUISES[name](piece(k))) for k in range(20)]
    traced = [
        report["piece"] == f"piece {k}" and report["longest_notes"] >= PASSAGE
        for k, report in enumerate(reports)
    ]
    assert sum(traced) >= 19, reports


def test_a_new_piece_is_not_accused(index):
    reports = [index.report(piece(k)) for k in range(1000, 1040)]
    assert all(r["longest_notes"] < PASSAGE and r["covered"] == 0 for r in reports)


def test_no_passage_reaches_from_one_line_into_another():
    "Two halves of a tune, in two parts, are two passages: of the take and of the text."
    whole = random_line(np.random.default_rng(3), 48)
    halves = whole[:24] + [[t, 1, *more] for t, _, *more in whole[24:]]
    one, two = (make_score(rows, [Part(40), Part(41)], ticks=24) for rows in (whole, halves))
    for known, take in ((one, two), (two, one)):
        report = OriginalityIndex.build([("it", known)]).report(take)
        assert 20 <= report["longest_notes"] <= 24 and report["covered"] > 0.8, report


def test_where_it_lies(index):
    "The bar, from 1, and the part, from 0, of what was copied."
    copied = piece(5).notes[piece(5).notes[:, PART] == 2].tolist()
    rows = random_line(np.random.default_rng(77), 90)
    rows += [[t + 4 * 96, 1, *more] for t, _, *more in copied]
    report = index.report(make_score(rows, [Part(40), Part(42)], ticks=24))
    assert (report["piece"], report["at_bar"], report["part"]) == ("piece 5", 5, 1)


def test_the_size_of_a_block_changes_nothing(index, monkeypatch):
    take = ornamented(piece(7), 8)
    whole = index.report(take)
    monkeypatch.setattr(passages, "BLOCK", 1000)
    small = OriginalityIndex(index.text, index.starts, index.names)
    assert small.report(take) == whole and len(small._blocks) > 5


# The baseline.


def corpus_of(folder: Path, valid: int, test: int) -> Layout:
    "A corpus of random pieces: 60 to learn from, 30 held out for validation, 10 for the test."
    seeds = [*range(60), *range(valid, valid + 30), *range(test, test + 10)]
    splits = ["train"] * 60 + ["valid"] * 30 + ["test"] * 10
    pieces = (
        make_piece(piece(seed), Vocab(), f"random/{k:03d}", "random")
        for k, seed in enumerate(seeds)
    )
    layout = Layout(folder)
    write_corpus(layout, pieces, splits, ["ours"] * 100, Vocab())
    return layout


def test_the_baseline_is_the_validation_split(tmp_path):
    "Test pieces do not touch it; copies among the validation pieces do. The index stays small."
    one, two, three = (
        corpus_of(tmp_path / name, *seeds)
        for name, seeds in (("one", (500, 800)), ("two", (500, 20)), ("three", (20, 800)))
    )
    mine, same, copied = (OriginalityIndex.load(layout.originality) for layout in (one, two, three))
    assert np.array_equal(mine.baseline, same.baseline) and len(mine.baseline) == 30 >= MIN_EXCERPTS
    assert mine.baseline[:, 0].max() < PASSAGE <= np.median(copied.baseline[:, 0])
    assert mine.report(piece(4))["percentile"] == 100 > copied.report(piece(4))["percentile"] > 20
    assert one.originality.stat().st_size <= 0.2 * one.corpus.stat().st_size


def test_a_draw_is_fair_and_the_same_again(monkeypatch):
    monkeypatch.setattr(dataset, "HELD_OUT", 20)
    draws = []
    for _ in range(2):
        draws.append(dataset._Reservoir())
        for k in range(1000):
            draws[-1].offer(k)
    assert draws[0] == draws[1] and len(set(draws[0])) == 20 and 300 < np.mean(draws[0]) < 700


def test_a_percentile_counts_ties_half(index):
    "Of excerpts that are all alike, half share less than one that is like them."
    known = index.against(piece(k) for k in range(MIN_EXCERPTS))
    few = index.against(piece(k) for k in range(MIN_EXCERPTS - 1))
    alike = np.tile(known.baseline[:1], (MIN_EXCERPTS, 1))
    like = OriginalityIndex(known.text, known.starts, known.names, "", alike)
    copy = piece(
        int(np.argmin([index.report(piece(k))["longest_notes"] for k in range(MIN_EXCERPTS)]))
    )
    single = make_score([(0, 0, 60, 24, 80)], [Part(40)], ticks=24)
    assert few.report(copy)["percentile"] is None is like.report(single)["percentile"]
    assert like.report(piece(2000))["percentile"] == 0 == known.report(piece(2000))["percentile"]
    assert like.report(copy)["percentile"] == 50
