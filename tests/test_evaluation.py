"""The measures against muspy's own values, and figures that a report must get right."""

import numpy as np
import pytest

from musicgen.evaluation.adherence import key_agreement, key_relation
from musicgen.evaluation.baselines import bootstrap_means
from musicgen.evaluation.likelihood import KINDS, gain_per_note, kinds_of_rows, sum_by_kind
from musicgen.evaluation.takes import varied_requests
from musicgen.model.piece import make_piece
from musicgen.music.comparison import compare
from musicgen.music.edit import transpose
from musicgen.music.instruments import DRUMS
from musicgen.music.keys import KEYS, find_key
from musicgen.music.metrics import MEASURES, measures
from musicgen.music.score import Part, make_score
from musicgen.music.tokens import Vocab

TRIO = (Part(0), Part(40), Part(DRUMS))

# Notes as (onset, part, pitch, duration), 16 ticks to the quarter, in 4/4, for the parts of TRIO.
# No note ends on a beat, and no piece on a bar line: there muspy counts one beat, or one bar, more.
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

# Computed by muspy 0.5.0 from the same notes at resolution=16, drum tracks with is_drum=True:
# muspy.pitch_class_entropy, scale_consistency, pitch_range, polyphony, empty_beat_rate, and
# groove_consistency with measure_resolution=64.
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


def score_of(notes):
    "A score of (onset, part, pitch, duration), all notes of velocity 80."
    return make_score([(*note, 80) for note in notes], TRIO, ticks=16)


@pytest.mark.parametrize("name", SCORES)
def test_measures_are_those_of_muspy(name):
    ours = measures(score_of(SCORES[name]))
    assert {k: ours[k] for k in MUSPY[name]} == pytest.approx(MUSPY[name], abs=1e-6)


def test_where_we_differ_from_muspy_on_purpose():
    """Music that ends on a bar line.

    muspy 0.5.0 adds an empty bar to it (groove 0.96875) and fills the beat after a note."""
    full = [(16 * k, 0, 60, 16) for k in (0, 1, 2, 3, 4, 5, 7)]
    ours = measures(score_of(full))
    assert ours["groove_consistency"] == 1 - 1 / 64  # one onset of two bars
    assert ours["empty_beats"] == 1 / 8  # muspy.empty_beat_rate: 0.0
    drums = measures(score_of([(16 * k, 2, 40, 4) for k in range(8)]))
    assert drums["pitch_range"] == 0 and drums["polyphony"] == 0  # muspy: -127 and NaN


def test_every_measure_is_defined_on_silence():
    assert measures(score_of([])) == {name: value for name, (_, value) in MEASURES.items()}


def test_a_comparison_is_finite_whatever_the_values():
    "Equal, constant, far apart: an overlap in [0, 1], a divergence of at most 12.9 nats."
    sets = [
        [0.0],
        [0.0] * 5,
        [1e6] * 3,
        [0.0, 1e6],
        list(range(9)),
        [1e-9, 0.0],
    ]
    pieces = lambda values: [dict.fromkeys(MEASURES, value) for value in values]
    for a in sets:
        for b in sets:
            for row in compare(pieces(a), pieces(b)):
                assert 0 <= row["kl"] < 12.91 and 0 <= row["overlap"] <= 1 + 1e-9, (a, b, row)
                if a is b:
                    assert row["kl"] == 0 and row["overlap"] == pytest.approx(1)
    quiet = [measures(score_of([]))]
    rows = compare(quiet, [measures(score_of(SCORES["tune"]))], quiet)
    columns = ("overlap", "kl", "real_overlap", "real_kl")
    assert all(np.isfinite([row[column] for column in columns]).all() for row in rows)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    "Of 200 samples of 60 pieces, some 95 % have an interval over the true mean a note."
    rng, covered = np.random.default_rng(5), 0
    for _ in range(200):
        notes = rng.integers(20, 400, 60)
        nats = notes * rng.normal(5.0, 0.8, 60)
        _, low, high = bootstrap_means(nats[:, None], notes, draws=400)[:, 0]
        covered += low <= 5.0 <= high
    assert 0.88 <= covered / 200 <= 0.99
    gain = gain_per_note(np.array([30.0, 60.0]), np.array([20.0, 70.0]), np.array([10, 10]))
    assert gain["value"] == 0 and gain["low"] == -1 and gain["high"] == 1


def test_rows_belong_to_the_instrument_that_plays_them():
    "What the families cost together is what the piece cost, rests and end included."
    vocab = Vocab()
    notes = [(0, 2, 36, 240, 80), (7680, 0, 60, 480, 80), (7680, 1, 67, 480, 80)]
    piece = make_piece(make_score(notes, TRIO), vocab)
    kinds = kinds_of_rows(piece, vocab)
    assert [KINDS[k] for k in kinds[[0, -1]]] == ["Drums", "Strings"]
    assert len(kinds) == len(piece.rows) + 1
    nats = np.random.default_rng(0).random((len(kinds), 5))
    sums = sum_by_kind([nats], [kinds])
    assert np.allclose(sums.sum(1)[0], nats.sum(0))
    assert np.allclose(sums[0, KINDS.index("Drums")], nats[0])


@pytest.mark.parametrize("count", [1, 24, 60, 300])
def test_each_key_is_requested_equally_often(count):
    keys = [request.key for request in varied_requests(count, seed=3)]
    times = [keys.count(key) for key in KEYS]
    assert len(keys) == count and max(times) - min(times) <= 1


def test_a_transposed_take_is_in_the_wrong_key():
    "The relations hold for every tonic, and a share counts only what is exact."
    pitches = [60, 64, 67, 72, 71, 67, 65, 62, 64, 62, 60, 60]
    tune = make_score([(480 * k, 0, pitch, 480, 80) for k, pitch in enumerate(pitches)])
    assert find_key(tune) == "C major"
    keys = [find_key(transpose(tune, by)) for by in range(12)]
    agreement = key_agreement([("C major", key) for key in keys])
    assert agreement["exact"]["value"] == pytest.approx(1 / 12, abs=1e-4)
    assert agreement["relations"]["fifth"] == pytest.approx(2 / 12, abs=1e-4)
    for key in KEYS:
        relations = [key_relation(key, other) for other in KEYS]
        counts = [relations.count(r) for r in ("exact", "relative", "fifth", "parallel")]
        assert counts == [1, 1, 2, 1], key
