"""The measures against muspy's own values, and figures that a report must get right."""

import numpy as np
import pytest

from musicgen.evaluation.adherence import _relation, key_agreement, varied_requests
from musicgen.evaluation.baselines import KINDS, _apart, _gain, _means, _players
from musicgen.model.context import make_piece
from musicgen.music.metrics import (
    KEYS,
    MEASURES,
    _divergence,
    _overlap,
    compare,
    find_key,
    measures,
)
from musicgen.music.edit import transpose
from musicgen.music.instruments import DRUMS
from musicgen.music.score import Part, make_score
from musicgen.music.tokens import Vocab

BAND = (Part(0), Part(40), Part(DRUMS))

# Notes as (onset, part, pitch, duration), 16 ticks to the quarter, in 4/4. The parts are those of BAND. No note
# ends on a beat, and no piece on a bar line: there muspy counts one beat, or one bar, more than we do.
SCORES = dict(
    tune=[
        (0, 0, 72, 15),
        (16, 0, 74, 15),
        (32, 0, 76, 31),
        (64, 0, 77, 15),
        (88, 0, 76, 7),
        (96, 0, 74, 30),
        (0, 1, 48, 60),
        (0, 1, 52, 60),
        (0, 1, 55, 60),
        (64, 1, 50, 62),
        (64, 1, 53, 62),
    ],
    chromatic=[(8 * k, 0, 60 + k, 7) for k in range(12)],
    unison=[
        (0, 0, 60, 20),
        (0, 1, 60, 20),
        (10, 1, 60, 30),
        (40, 0, 67, 10),
        (45, 1, 64, 10),
        (130, 0, 59, 3),
    ],
    band=[
        (0, 0, 57, 30),
        (32, 0, 61, 12),
        (48, 0, 64, 12),
        (0, 2, 36, 4),
        (16, 2, 42, 4),
        (32, 2, 38, 4),
        (64, 2, 36, 4),
        (88, 2, 42, 4),
        (200, 2, 38, 4),
        (216, 0, 58, 6),
    ],
    holes=[(0, 0, 61, 5), (70, 0, 66, 9), (150, 1, 30, 20), (250, 0, 90, 4)],
)

# Computed by muspy 0.5.0 from the same notes at resolution=16, drum tracks with is_drum=True: muspy.pitch_class_entropy,
# scale_consistency, pitch_range, polyphony, empty_beat_rate, and groove_consistency with measure_resolution=64.
MUSPY = dict(
    tune=dict(
        pitch_class_entropy=2.231270,
        scale_consistency=1.0,
        pitch_range=29,
        polyphony=3.336,
        empty_beats=0.0,
        groove_consistency=0.968750,
    ),
    chromatic=dict(
        pitch_class_entropy=3.584963,
        scale_consistency=0.583333,
        pitch_range=11,
        polyphony=1.0,
        empty_beats=0.0,
        groove_consistency=0.937500,
    ),
    unison=dict(
        pitch_class_entropy=1.792481,
        scale_consistency=1.0,
        pitch_range=8,
        polyphony=1.086207,
        empty_beats=0.444444,
        groove_consistency=0.960938,
    ),
    band=dict(
        pitch_class_entropy=2.0,
        scale_consistency=0.75,
        pitch_range=7,
        polyphony=1.0,
        empty_beats=0.428571,
        groove_consistency=0.958333,
    ),
    holes=dict(
        pitch_class_entropy=0.811278,
        scale_consistency=1.0,
        pitch_range=60,
        polyphony=1.0,
        empty_beats=0.687500,
        groove_consistency=0.968750,
    ),
)


def made(notes):
    return make_score([(*note, 80) for note in notes], BAND, ticks=16)


@pytest.mark.parametrize("name", SCORES)
def test_measures_are_those_of_muspy(name):
    ours = measures(made(SCORES[name]))
    assert {k: ours[k] for k in MUSPY[name]} == pytest.approx(MUSPY[name], abs=1e-6)


def test_where_we_differ_from_muspy_on_purpose():
    "Music that ends on a bar line: muspy 0.5.0 adds an empty bar to it (groove 0.96875) and fills the beat after a note."
    full = [(16 * k, 0, 60, 16) for k in (0, 1, 2, 3, 4, 5, 7)]
    ours = measures(made(full))
    assert ours["groove_consistency"] == 1 - 1 / 64  # one onset of two bars
    assert ours["empty_beats"] == 1 / 8  # muspy.empty_beat_rate: 0.0
    drums = measures(made([(16 * k, 2, 40, 4) for k in range(8)]))
    assert drums["pitch_range"] == 0 and drums["polyphony"] == 0  # muspy: -127 and NaN


def test_every_measure_is_defined_on_silence():
    assert measures(made([])) == {name: nothing for name, (_, nothing) in MEASURES.items()}


def test_a_comparison_is_finite_whatever_the_values():
    "Equal, constant, far apart, one of each: an overlap in [0, 1], a divergence of at most 12.9 nats."
    sets = [
        np.zeros(1),
        np.zeros(5),
        np.full(3, 1e6),
        np.array([0.0, 1e6]),
        np.arange(9.0),
        np.array([1e-9, 0.0]),
    ]
    for a in sets:
        for b in sets:
            kl, area = _divergence(a, b), _overlap(a, b)
            assert np.isfinite(kl) and 0 <= kl < 12.91 and 0 <= area <= 1 + 1e-9
            if a is b:
                assert kl == 0 and area == pytest.approx(1)
    quiet = [measures(made([]))]
    rows = compare(quiet, [measures(made(SCORES["tune"]))], quiet)
    assert all(
        np.isfinite([row[k] for k in ("overlap", "kl", "real_overlap", "real_kl")]).all()
        for row in rows
    )


def test_an_interval_covers_the_truth_as_often_as_it_says():
    "Of 200 samples of 60 pieces, some 95 % have an interval over the true mean a note."
    dice, covered = np.random.default_rng(5), 0
    for _ in range(200):
        notes = dice.integers(20, 400, 60)
        nats = notes * dice.normal(5.0, 0.8, 60)
        _, low, high = _means(nats[:, None], notes, draws=400)[:, 0]
        covered += low <= 5.0 <= high
    assert 0.88 <= covered / 200 <= 0.99
    gain = _gain(np.array([30.0, 60.0]), np.array([20.0, 70.0]), np.array([10, 10]))
    assert gain["value"] == 0 and gain["low"] == -1 and gain["high"] == 1


def test_rows_belong_to_whoever_plays_them():
    "What the families cost together is what the piece cost, rests and end included."
    vocab = Vocab()
    piece = make_piece(
        make_score([(0, 2, 36, 240, 80), (7680, 0, 60, 480, 80), (7680, 1, 67, 480, 80)], BAND),
        vocab,
    )
    kinds = _players(piece, vocab)
    assert [KINDS[k] for k in kinds[[0, -1]]] == ["Drums", "Strings"] and len(kinds) == len(
        piece.rows
    ) + 1
    nats = np.random.default_rng(0).random((len(kinds), 5))
    apart = _apart([nats], [kinds])
    assert np.allclose(apart.sum(1)[0], nats.sum(0))
    assert np.allclose(apart[0, KINDS.index("Drums")], nats[0])


@pytest.mark.parametrize("count", [1, 24, 60, 300])
def test_each_key_is_asked_equally_often(count):
    asked = [r.key for r in varied_requests(count, seed=3)]
    times = [asked.count(key) for key in KEYS]
    assert len(asked) == count and max(times) - min(times) <= 1


def test_a_transposed_answer_is_the_wrong_key():
    "The relations hold for every tonic, and a share counts only what is exact."
    tune = make_score(
        [
            (480 * k, 0, p, 480, 80)
            for k, p in enumerate([60, 64, 67, 72, 71, 67, 65, 62, 64, 62, 60, 60])
        ]
    )
    assert find_key(tune) == "C major"
    moved = [find_key(transpose(tune, by)) for by in range(12)]
    found = key_agreement([("C major", key) for key in moved])
    assert found["exact"]["value"] == pytest.approx(1 / 12, abs=1e-4)
    assert found["relations"]["fifth"] == pytest.approx(2 / 12, abs=1e-4)
    for key in KEYS:
        signs = [_relation(key, other) for other in KEYS]
        assert [signs.count(r) for r in ("exact", "relative", "fifth", "parallel")] == [
            1,
            1,
            2,
            1,
        ], key
