"""What training and tuning keep: killed and gone on with, on two processes, on a full disk, with others at work."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from musicgen.core import Layout, Rejection
from musicgen.corpus.dataset import Corpus, write_example_corpus
from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig
from musicgen.model.sampler import Augment, Sampler
from musicgen.model.trainer import TrainingSettings, fit, validation_loss
from musicgen.train import train
from musicgen.tune import tune

posix = pytest.mark.skipif(os.name != "posix", reason="a limit or signal of POSIX")
PLAN = TrainingSettings(rounds=3, steps=12, batch=8, length=32, warmup=6)
RUN = dict(notes=8192, rounds=4, patience=4, hidden=32, layers=2, head=16, dropout=0.1, groove=0.3)
CONTEST = dict(
    learning_rates="0.002,0.005", batches="4,8", lengths="16", notes=512, judged=200, hidden=16
)
KILLS = int(os.environ.get("MUSICGEN_KILLS", 3))  # before conftest clears the names


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Layout:
    "A root with a small corpus, tuned."
    layout = Layout(tmp_path_factory.mktemp("house") / "a root")
    write_example_corpus(layout, pieces=12)
    tune(layout, "0.004", "8", "32", notes=128, judged=100, hidden=16)
    return layout


@pytest.fixture(scope="module")
def alone(house) -> tuple[list, dict]:
    "The run that nobody disturbs: its history and its weights."
    return learn(house)


def twin(house: Layout, path) -> Layout:
    "The same root in another place."
    shutil.copytree(house.root, path)
    return Layout(path)


def learn(
    house: Layout, checkpoint=None, plan=PLAN, hidden=32, after=None, **more
) -> tuple[list, dict]:
    "A run over the small corpus: its history and its weights."
    corpus = Corpus(house)
    shape = MusicLSTMConfig(hidden=hidden, head=16, sources=corpus.sources)
    torch.manual_seed(0)
    model = MusicLSTM(shape)
    watch = (lambda number, history: after(model, number)) if after else None
    history = fit(
        model,
        Sampler(corpus.pieces("train"), shape, Augment()),
        validation_loss(corpus.pieces("valid")),
        plan,
        checkpoint,
        after=watch,
        **more,
    )
    return history, model.state_dict()


def same(one, other) -> bool:
    "Whether two nested things hold the same tensors, bit by bit, and the same values."
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def process(does, *words):
    "A process of its own, forked from one that has imported torch and done nothing with it."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["musicgen.train"])
    started = context.Process(target=does, args=words)
    started.start()
    return started


def finish(started, seconds: float = 120) -> int:
    started.join(seconds)
    assert started.exitcode is not None, "it did not come to its end"
    return started.exitcode


# Kills.


def train_at(root):
    train(Layout(root), **RUN)


def rounds_done(layout: Layout) -> int:
    return len(layout.history.read_text().splitlines()) - 1 if layout.history.exists() else 0


def begun(started, layout: Layout):
    "Waits until the loop of a training opens its events, or the training has ended."
    while not layout.events.exists() and started.exitcode is None:
        time.sleep(0.005)


def strike(layout: Layout, seconds: float) -> bool:
    "Trains, and kills it so long after its beginning; whether that fell into a round."
    started = process(train_at, str(layout.root))
    begun(started, layout)
    started.join(seconds)
    if started.exitcode is not None:
        return False
    started.kill()
    if (status := finish(started)) == 0:
        return False  # it ended while it was looked for
    assert status == -signal.SIGKILL
    return rounds_done(layout) < RUN["rounds"]


@posix
def test_a_training_killed_at_random_moments_ends_with_the_same_bits(house, tmp_path):
    "kill -9 until it has fallen into a round, and again from the beginning; MUSICGEN_KILLS says how many times."
    whole = twin(house, tmp_path / "whole")
    undisturbed = process(train_at, str(whole.root))
    begun(undisturbed, whole)
    began = time.monotonic()
    assert finish(undisturbed) == 0
    lasts, expected = time.monotonic() - began, torch.load(whole.last, weights_only=True)
    seed = int(time.time())
    print(f"seed {seed}, undisturbed {lasts:.1f} s")  # pytest shows it when a test fails
    dice, strikes, kept = np.random.default_rng(seed), 0, []
    for k in range(KILLS):
        here = twin(house, tmp_path / f"{k}")
        while not strike(here, float(dice.uniform(0, lasts))):
            strikes += 1
            assert strikes < 20 * KILLS, f"seed {seed}: the kills do not fall into a round"
            shutil.rmtree(here.root)
            twin(house, here.root)  # it had ended before
        kept.append(rounds_done(here))
        assert finish(process(train_at, str(here.root))) == 0 and rounds_done(here) == RUN["rounds"]
        assert same(torch.load(here.last, weights_only=True), expected), (
            f"seed {seed}, repetition {k}"
        )
        assert here.weights.read_bytes() == whole.weights.read_bytes()
        assert here.history.read_bytes() == whole.history.read_bytes()
        shutil.rmtree(here.root)
    print(f"{KILLS} kills in a round, with {kept} rounds kept; {strikes} others")


def test_the_counter_check_of_the_kills(house, tmp_path):
    "Other dice, other bits: the comparison can fail."
    one, other = twin(house, tmp_path / "one"), twin(house, tmp_path / "other")
    small = RUN | dict(notes=512, rounds=1)
    train(one, **small)
    train(other, **small, seed=1)
    assert not same(*(torch.load(x.last, weights_only=True)["model"] for x in (one, other)))


# Checkpoints.


def starve(root, checkpoint, size, answers):
    "Goes on with a run on a disk where no file may grow beyond a size."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    try:
        learn(Layout(root), checkpoint)
    except Rejection as e:
        answers.send(e.sentence)
    answers.close()


@posix
def test_a_full_disk_leaves_the_last_good_checkpoint(house, alone, tmp_path):
    "One sentence; and with room again the run ends as an undisturbed one."
    path = tmp_path / "run" / "last.pt"
    learn(house, path, after=lambda model, number: True)
    good = path.read_bytes()
    for size in (2000, len(good) - 10):
        hears, says = multiprocessing.get_context("forkserver").Pipe(duplex=False)
        assert finish(process(starve, str(house.root), path, size, says)) == 0
        says.close()
        sentence = hears.recv()
        assert str(path) in sentence and "the last good one stands" in sentence, sentence
        assert path.read_bytes() == good and os.listdir(path.parent) == ["last.pt"]
    assert same(learn(house, path), alone)


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(house, alone, tmp_path):
    def poison(model, number):
        for p in model.parameters() if number == 1 else ():
            p.data.fill_(float("nan"))

    path = tmp_path / "last.pt"
    with pytest.raises(
        Rejection, match="loss became nan in round 3, step 1, .*last good checkpoint stands"
    ):
        learn(house, path, after=poison)
    assert len(torch.load(path, weights_only=True)["history"]) == 2
    assert same(learn(house, path), alone)


def test_the_checkpoint_of_another_run_is_not_gone_on_with(house, alone, tmp_path):
    "Another plan, another shape: the run begins at its beginning."
    path = tmp_path / "last.pt"
    for other in (
        dict(plan=TrainingSettings(rounds=2, steps=3, batch=4, length=16)),
        dict(hidden=24),
    ):
        learn(house, path, **other)
        history, weights = learn(house, path)
        assert same((history, weights), alone) and len(history) == PLAN.rounds


def test_a_damaged_checkpoint_is_one_sentence(house, tmp_path):
    "Cut off, empty, foreign: never a run that begins again without a word."
    path = tmp_path / "last.pt"
    learn(house, path, after=lambda model, number: True)
    good = path.read_bytes()
    torch.save(dict(model=3), tmp_path / "foreign.pt")
    for broken in (
        b"",
        good[:100],
        good[: len(good) // 2],
        good[:-10],
        b"{}" * 500,
        (tmp_path / "foreign.pt").read_bytes(),
    ):
        path.write_bytes(broken)
        with pytest.raises(Rejection) as refused:
            learn(house, path)
        sentence = refused.value.sentence
        assert str(path) in sentence and "remove it" in sentence and len(sentence) < 400, sentence
        assert path.read_bytes() == broken
    path.write_bytes(good)
    assert len(learn(house, path)[0]) == PLAN.rounds


# What is seen.


def read_events(folder) -> dict[str, list[tuple[int, float]]]:
    "The scalars of all files of TensorBoard in a folder: tag -> (step, value)."
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length, its checksum, an event, its checksum
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            at += 16 + size
    return found


def test_tensorboard_reads_the_run(house, tmp_path):
    history, _ = learn(house, events=tmp_path / "events")
    found = read_events(tmp_path / "events")
    assert set(found) == {
        "train/loss",
        "train/learning_rate",
        "train/notes_per_second",
        "valid/nats",
    }
    assert [step for step, _ in found["valid/nats"]] == [12, 24, 36]
    assert np.allclose(
        [x for _, x in found["valid/nats"]], [line["valid"] for line in history], atol=1e-4
    )
    assert [step for step, _ in found["train/loss"]] == [10, 20, 30]
    assert np.allclose(
        [x for _, x in found["train/learning_rate"]], [PLAN.rate(s) for s in (9, 19, 29)]
    )
    assert all(speed > 0 for _, speed in found["train/notes_per_second"])


# Several processes on one model.

SPREAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_learning import Layout, learn, same
torch.distributed.init_process_group("gloo")
rank, house, out = torch.distributed.get_rank(), Layout(sys.argv[2]), sys.argv[3]
history, weights = learn(house)
learn(house, out + "/last.pt", after=lambda model, number: True)
torch.distributed.barrier()
again = same(learn(house, out + "/last.pt"), (history, weights))
torch.save(dict(history=history, weights=weights, again=again), f"{out}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_learn_one_model(house, alone, tmp_path):
    "Under torch's own launcher, over the loopback: one model, the loss of a single process, and it resumes."
    (tmp_path / "spread.py").write_text(SPREAD)
    here = os.path.dirname(os.path.abspath(__file__))
    words = [
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "2",
        tmp_path / "spread.py",
        here,
        house.root,
        tmp_path,
    ]
    loopback = dict(GLOO_SOCKET_IFNAME="lo") if sys.platform == "linux" else {}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | loopback | dict(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second), "both hold the same model"
    assert first["again"], "stopped after a round and begun again, it ends with the same bits"
    history, weights = alone
    assert not same(weights, first["weights"]), "the counter-check: they did not each run alone"
    for alone, spread in zip(history, first["history"], strict=True):
        assert abs(alone["valid"] / spread["valid"] - 1) < 0.05, (alone, spread)


# Several processes on one study.


def answers(layout: Layout) -> list:
    "The trials of the only study of a root."
    import optuna

    (study,) = optuna.study.get_all_study_summaries(f"sqlite:///{layout.study}")
    return optuna.load_study(
        study_name=study.study_name, storage=f"sqlite:///{layout.study}"
    ).get_trials()


@pytest.fixture(scope="module")
def tuned(house, tmp_path_factory) -> Layout:
    "The small contest, undisturbed, by one process."
    layout = untuned(house, tmp_path_factory.mktemp("tuned") / "root")
    tune(layout, **CONTEST)
    return layout


def untuned(house, path) -> Layout:
    here = twin(house, path)
    shutil.rmtree(here.tune)
    return here


def check_contest(layout: Layout, tuned: Layout):
    "Every point has one answer, and the same as in the contest that nobody disturbed."
    ended = Counter(
        str(t.params) for t in answers(layout) if t.state.name in ("COMPLETE", "PRUNED")
    )
    assert len(ended) == 4 and set(ended.values()) == {1}, ended
    assert not [t for t in answers(layout) if t.state.name in ("RUNNING", "WAITING")]
    assert layout.best.read_bytes() == tuned.best.read_bytes()
    assert layout.trials.read_bytes() == tuned.trials.read_bytes()


def test_the_number_of_workers_changes_no_byte(house, tuned, tmp_path):
    here = untuned(house, tmp_path / "root")
    tune(here, **CONTEST, workers=2)
    check_contest(here, tuned)
    assert not [t for t in answers(here) if t.state.name == "FAIL"]
    assert json.loads(here.best.read_text())["learning_rate"] in (0.002, 0.005)


def tune_at(root, workers):
    tune(Layout(root), **CONTEST, workers=workers)


@posix
@pytest.mark.parametrize("workers", [1, 2])
def test_a_tuning_killed_in_a_trial_loses_none_and_repeats_none(house, tuned, tmp_path, workers):
    "With two workers those outlive the one that is killed, and finish what they have in hand."
    here = untuned(house, tmp_path / "root")
    started = process(tune_at, str(here.root), workers)
    until = time.monotonic() + 120
    while not list(here.tune.glob("*.*.lock")):  # somebody has a trial
        assert time.monotonic() < until and started.exitcode is None
        time.sleep(0.005)
    started.kill()
    assert finish(started) == -signal.SIGKILL and not here.best.exists()
    tune(here, **CONTEST)
    check_contest(here, tuned)


def test_two_tunings_of_one_root_share_the_work(house, tuned, tmp_path):
    here = untuned(house, tmp_path / "root")
    both = [process(tune_at, str(here.root), 1) for _ in range(2)]
    assert [finish(started) for started in both] == [0, 0]
    check_contest(here, tuned)


def test_tpe_gives_up_what_goes_badly(house, tmp_path):
    "A trial that is pruned is an answer: it has its loss, and it is not asked for again."
    here = untuned(house, tmp_path / "root")
    wide = CONTEST | dict(learning_rates="0.00001,0.01", notes=1024, sampler="tpe", trials=8)
    trials = tune(here, **wide)
    ends = [t["end"] for t in trials]
    assert len(trials) == 8 == len(answers(here)) and 3 <= ends.count("complete") < 8
    assert ends == sorted(ends) and all(t["loss"] for t in trials)  # complete, then pruned
    early = [t for t in answers(here) if t.state.name == "PRUNED"]
    assert early and all(1 <= len(t.intermediate_values) < 4 for t in early)
    assert tune(here, **wide) == trials and len(answers(here)) == 8
