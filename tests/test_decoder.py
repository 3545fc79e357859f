"""The model that ships, stepped by numpy: torch's scores, takes that part from one memory, and whole numbers that cost no likelihood."""

import os
import subprocess
import sys

import numpy as np
import pytest

from musicgen.core import SHIPPED_MODEL, Layout, Rejection
from musicgen.corpus.dataset import Corpus, write_example_corpus
from musicgen.model.context import STEP_COLUMNS
from musicgen.model.decoder import PRECISIONS, Decoder, numeric_path, read_weights
from musicgen.model.sampler import prepare
from musicgen.music.tokens import FIELDS, Vocab


@pytest.fixture(scope="module")
def shipped():
    weights, about = read_weights(SHIPPED_MODEL)
    return weights, Vocab(**about["config"]["vocab"]), tuple(about["config"]["sources"])


@pytest.fixture(scope="module")
def heard(shipped, tmp_path_factory):
    "The ids of real pieces, none of them from the training split where the split has others."
    layout = Layout(tmp_path_factory.mktemp("decoder"))
    write_example_corpus(layout, pieces=12)
    corpus = Corpus(layout)
    pieces = [p for split in ("valid", "test", "train") for p in corpus.pieces(split)][:8]
    return [prepare(p, shipped[1], shipped[2]) for p in pieces]


def scores(decoder, ids, t, f):
    "Of one field at one row; those of parts that cannot be chosen are far below."
    asked = ids.echo[[t], FIELDS.index(f)], ids.chosen[[t]], ids.held_now[[t]]
    if f != "part":
        return decoder.scores(f, *asked)[0]
    found = decoder.part_scores(ids.parts[[t]], *asked)[0]
    return np.where(ids.away[t], -1e9, found)


def step(ids, t, takes=1):
    "What is heard before row `t`."
    return tuple(a[[t]].repeat(takes, 0) for a in (ids.seen[:, :STEP_COLUMNS], ids.held))


def steps(decoder, ids, rows):
    decoder.start(1, ids.seen[0, STEP_COLUMNS:])
    for t in range(min(rows, len(ids.target))):
        decoder.hear(*step(ids, t))
        yield t


def nats(decoder, ids, rows=120):
    "Of all that was chosen in the first rows."
    total = 0.0
    for t in steps(decoder, ids, rows):
        for k, f in enumerate(FIELDS):
            if ids.target[t, k] >= 0:
                x = scores(decoder, ids, t, f).astype(float)
                total += np.logaddexp.reduce(x) - x[ids.target[t, k]]
    return total


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_every_score_is_that_of_torch(shipped, heard, precision):
    import torch

    from musicgen.model.lstm import collate, load_model

    model, ids = load_model(SHIPPED_MODEL)[0], max(heard, key=lambda ids: ids.away.shape[1])
    batch = collate([ids], [True], len(ids.target))
    with torch.no_grad():
        theirs = {f: s.numpy() for f, s in model.scores(model.hidden(batch)[0], batch).items()}
    decoder = Decoder(*shipped[:2], precision)
    for t in steps(decoder, ids, 150):
        for f in FIELDS:
            assert np.abs(scores(decoder, ids, t, f) - theirs[f][t]).max() < 1e-4, (t, f)


def test_whole_numbers_cost_less_than_a_hundredth_of_the_likelihood(shipped, heard):
    "onnxruntime is one of the tools that tests are run with: that it is missing is a failure, and not a reason to skip."
    loss = {p: sum(nats(Decoder(*shipped[:2], p), ids) for ids in heard) for p in ("fp32", "int8")}
    assert loss["fp32"] > 0 and loss["int8"] != loss["fp32"]
    assert loss["int8"] < 1.01 * loss["fp32"]


def test_without_onnxruntime_whole_numbers_are_refused(shipped, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Rejection, match=r'pip install "musicgen\[fast\]"'):
        Decoder(*shipped[:2], "int8")
    with pytest.raises(Rejection, match="'fp16' is not one of fp32, fp64, int8"):
        Decoder(*shipped[:2], "fp16")
    Decoder(*shipped[:2])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_takes_part_from_one_memory(shipped, heard, precision):
    ids, first = heard[0], Decoder(*shipped[:2], precision)
    for _ in steps(first, ids, 5):
        pass
    shift = lambda player, t, takes=1: player.scores(
        "shift", *(a[[t]].repeat(takes, 0) for a in (ids.echo[:, 0], ids.chosen)), None
    )
    before = shift(first, 4)
    one, three = first.own(), first.own()
    for other, takes in ((one, 1), (three, 3)):
        other.below, other.c, other.base, other.x = first.below, first.c, first.base, first.x
        other.spread(takes)
    assert np.allclose(shift(three, 4, 3), before, atol=1e-4)
    three.hear(*step(ids, 5, 3))
    one.hear(*step(ids, 6))
    assert np.array_equal(shift(first, 4), before)  # the first has heard nothing
    first.hear(*step(ids, 5))
    together, alone = shift(three, 5, 3), shift(first, 5)
    assert np.allclose(together, alone, atol=0.05 if precision == "int8" else 1e-4)
    with pytest.raises(ValueError):
        three.spread(2)


def test_its_memory_is_its_own(shipped, heard):
    first, ids = Decoder(*shipped[:2]), heard[0]
    other = first.own()
    for _ in steps(other, ids, 3):
        pass
    assert other.folded is first.folded and not first.below[0].any() and other.below[0].any()


def test_it_plays_without_torch():
    code = (
        "import sys; from musicgen.model.decoder import *; from musicgen.music.tokens import Vocab; "
        "Decoder(read_weights(sys.argv[1])[0], Vocab()); print('torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(SHIPPED_MODEL)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    assert said.stdout.strip() == "False"


def test_the_numeric_path_names_what_was_computed_with():
    assert (
        numeric_path().startswith(f"numpy {np.__version__} fp32")
        and numeric_path("fp64") != numeric_path()
    )
