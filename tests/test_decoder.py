"""The model that ships, stepped by numpy: torch's scores, takes from one state, precisions."""

import os
import subprocess
import sys

import numpy as np
import pytest

from musicgen.core import SHIPPED_MODEL, Layout, Rejection
from musicgen.corpus.dataset import Corpus, write_example_corpus
from musicgen.model import precision as products
from musicgen.model.columns import STEP_COLUMNS
from musicgen.model.decoder import Decoder
from musicgen.model.precision import PRECISIONS, numeric_path
from musicgen.model.sampler import piece_to_ids
from musicgen.model.weights import attribute_name, model_hash, read_weights, stored_name
from musicgen.music.tokens import FIELDS, Vocab


@pytest.fixture(scope="module")
def shipped():
    "Weights, vocabulary and sources of the model that ships."
    weights, about = read_weights(SHIPPED_MODEL)
    return weights, Vocab(**about["config"]["vocab"]), tuple(about["config"]["sources"])


@pytest.fixture(scope="module")
def pieces(shipped, tmp_path_factory):
    "The ids of real pieces, none of them from the training split where the split has others."
    layout = Layout(tmp_path_factory.mktemp("decoder"))
    write_example_corpus(layout, pieces=12)
    corpus = Corpus(layout)
    splits = [p for split in ("valid", "test", "train") for p in corpus.pieces(split)]
    return [piece_to_ids(p, shipped[1], shipped[2]) for p in splits[:8]]


def scores(decoder, ids, t, field):
    "Of one field at row `t`; those of parts that cannot be chosen are far below."
    head_inputs = ids.recall[[t], FIELDS.index(field)], ids.row[[t]], ids.sounding_after[[t]]
    if field != "part":
        return decoder.scores(field, *head_inputs)[0]
    of_parts = decoder.part_scores(ids.parts[[t]], *head_inputs)[0]
    return np.where(ids.unavailable[t], -1e9, of_parts)


def step_inputs(ids, t, takes=1):
    "What a decoder reads before row `t`."
    return tuple(a[[t]].repeat(takes, 0) for a in (ids.inputs[:, :STEP_COLUMNS], ids.sounding))


def steps(decoder, ids, rows):
    "Steps a decoder through the first rows of a piece; the number of each row, when it was read."
    decoder.start(1, ids.inputs[0, STEP_COLUMNS:])
    for t in range(min(rows, len(ids.target))):
        decoder.step(*step_inputs(ids, t))
        yield t


def nats(decoder, ids, rows=120):
    "The loss of the first rows."
    total = 0.0
    for t in steps(decoder, ids, rows):
        for k, field in enumerate(FIELDS):
            if ids.target[t, k] >= 0:
                x = scores(decoder, ids, t, field).astype(float)
                total += np.logaddexp.reduce(x) - x[ids.target[t, k]]
    return total


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_every_score_is_that_of_torch(shipped, pieces, precision):
    import torch

    from musicgen.model.batch import collate
    from musicgen.model.files import load_model

    model, ids = load_model(SHIPPED_MODEL)[0], max(pieces, key=lambda ids: ids.parts.shape[1])
    batch = collate([ids], [True], len(ids.target))
    with torch.no_grad():
        theirs = {f: s.numpy() for f, s in model.scores(model.hidden(batch)[0], batch).items()}
    decoder = Decoder(*shipped[:2], precision)
    for t in steps(decoder, ids, 150):
        for field in FIELDS:
            difference = np.abs(scores(decoder, ids, t, field) - theirs[field][t]).max()
            assert difference < 1e-4, (t, field)


def test_int8_costs_less_than_a_hundredth_of_the_likelihood(shipped, pieces):
    "onnxruntime is one of the tools that tests run with: if it is missing, that is a failure."
    loss = {p: sum(nats(Decoder(*shipped[:2], p), ids) for ids in pieces) for p in ("fp32", "int8")}
    assert loss["fp32"] > 0 and loss["int8"] != loss["fp32"]
    assert loss["int8"] < 1.01 * loss["fp32"]


def test_without_onnxruntime_int8_is_rejected(shipped, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Rejection, match=r'pip install "musicgen\[fast\]"'):
        Decoder(*shipped[:2], "int8")
    with pytest.raises(Rejection, match="'fp16' is not one of fp32, fp64, int8"):
        Decoder(*shipped[:2], "fp16")
    assert Decoder(*shipped[:2]).precision == "fp32"


@pytest.mark.parametrize("small", [True, False], ids=["AVX-512", "other"])
def test_products_of_either_processor_give_the_same_scores(shipped, pieces, monkeypatch, small):
    "The way that this processor does not take is forced, for one, three and eight takes."
    ids = pieces[0]
    ours = {n: scores_of_takes(shipped, ids, n) for n in (1, 3, 8)}
    monkeypatch.setattr(products, "has_small_products", lambda: small)
    for n, expected in ours.items():
        forced = scores_of_takes(shipped, ids, n)
        assert np.allclose(forced, expected, atol=1e-4)
        assert np.allclose(forced, ours[1], atol=1e-4)


def scores_of_takes(shipped, ids, takes):
    "(takes, 128) scores of the pitch at row 5, from decoders that step so many takes at once."
    decoder = Decoder(*shipped[:2])
    decoder.start(takes, ids.inputs[0, STEP_COLUMNS:])
    for t in range(6):
        decoder.step(*step_inputs(ids, t, takes))
    head_inputs = ids.recall[[5], 2], ids.row[[5]], ids.sounding_after[[5]]
    return decoder.scores("pitch", *(a.repeat(takes, 0) for a in head_inputs))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_takes_part_from_one_state(shipped, pieces, precision):
    ids, first = pieces[0], Decoder(*shipped[:2], precision)
    for _ in steps(first, ids, 5):
        pass

    def shift(decoder, t, takes=1):
        head_inputs = (a[[t]].repeat(takes, 0) for a in (ids.recall[:, 0], ids.row))
        return decoder.scores("shift", *head_inputs, None)

    before = shift(first, 4)
    one, three = first.own(), first.own()
    for other, takes in ((one, 1), (three, 3)):
        other.inputs, other.c, other.base, other.h = first.inputs, first.c, first.base, first.h
        other.spread(takes)
    assert np.allclose(shift(three, 4, 3), before, atol=1e-4)
    three.step(*step_inputs(ids, 5, 3))
    one.step(*step_inputs(ids, 6))
    assert np.array_equal(shift(first, 4), before)  # the first has read nothing
    first.step(*step_inputs(ids, 5))
    together, alone = shift(three, 5, 3), shift(first, 5)
    assert np.allclose(together, alone, atol=0.05 if precision == "int8" else 1e-4)
    with pytest.raises(ValueError, match="3 takes cannot be spread"):
        three.spread(2)


def test_a_decoder_has_a_state_of_its_own(shipped, pieces):
    first, ids = Decoder(*shipped[:2]), pieces[0]
    other = first.own()
    for _ in steps(other, ids, 3):
        pass
    assert other.folded is first.folded and not first.inputs[0].any() and other.inputs[0].any()


def test_it_needs_no_torch():
    code = (
        "import sys; from musicgen.model.decoder import Decoder; "
        "from musicgen.model.weights import read_weights; from musicgen.music.tokens import Vocab; "
        "Decoder(read_weights(sys.argv[1])[0], Vocab()); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(SHIPPED_MODEL)]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert process.stdout.strip() == "False"


def test_the_names_in_files_stay(shipped):
    "The file that ships has the names that it was written with, and its hash covers them."
    from musicgen.model.files import load_model

    weights, model = shipped[0], load_model(SHIPPED_MODEL)[0]
    assert {"seen.weight", "heads.pitch.trust.bias", "tower.lstms.0.bias_hh_l0"} <= set(weights)
    assert set(model.state_dict()) == set(weights)
    assert {attribute_name(name) for name in weights} == {n for n, _ in model.named_parameters()}
    assert all(stored_name(attribute_name(name)) == name for name in weights)
    stored = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert model_hash(stored) == read_weights(SHIPPED_MODEL)[1]["hash"]


def test_the_numeric_path_names_what_was_computed_with():
    assert numeric_path().startswith(f"numpy {np.__version__} fp32")
    assert numeric_path("fp64") != numeric_path()
