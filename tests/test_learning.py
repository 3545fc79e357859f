"""Training and tuning: killed and resumed, on two processes, on a full disk, side by side."""

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
from dataclasses import replace

import numpy as np
import pytest
import torch

from musicgen.core import Layout, Rejection
from musicgen.corpus.dataset import Corpus, write_example_corpus
from musicgen.model.loss import validation_loss
from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig
from musicgen.model.sampler import Augment, Sampler
from musicgen.model.settings import TrainingSettings
from musicgen.model.trainer import fit
from musicgen.train import train
from musicgen.tune import tune

posix = pytest.mark.skipif(os.name != "posix", reason="a limit or signal of POSIX")
SETTINGS = TrainingSettings(rounds=3, steps=12, batch=8, length=32, warmup=6)
RUN = dict(notes=8192, rounds=4, patience=4, hidden=32, layers=2, head=16, dropout=0.1, groove=0.3)
STUDY = dict(
    learning_rates="0.002,0.005", batches="4,8", lengths="16", notes=512, judged=200, hidden=16
)
KILLS = int(os.environ.get("MUSICGEN_KILLS", 3))  # before conftest clears the names


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Layout:
    "A root with a small corpus, tuned."
    layout = Layout(tmp_path_factory.mktemp("learning") / "a root")
    write_example_corpus(layout, pieces=12)
    tune(layout, "0.004", "8", "32", notes=128, judged=100, hidden=16)
    return layout


@pytest.fixture(scope="module")
def reference(root) -> tuple[list, dict]:
    "A run that is never interrupted: its history and its weights."
    return learn(root)


def copy_of(root: Layout, path) -> Layout:
    "The same root in another place."
    shutil.copytree(root.root, path)
    return Layout(path)


def learn(
    root: Layout, checkpoint=None, settings=SETTINGS, hidden=32, after=None, **more
) -> tuple[list, dict]:
    "A run over the small corpus: its history and its weights."
    corpus = Corpus(root)
    shape = MusicLSTMConfig(hidden=hidden, head=16, sources=corpus.sources)
    torch.manual_seed(0)
    model = MusicLSTM(shape)
    with_model = (lambda number, history: after(model, number)) if after else None
    history = fit(
        model,
        Sampler(corpus.pieces("train"), shape, Augment()),
        validation_loss(corpus.pieces("valid")),
        settings,
        checkpoint,
        after=with_model,
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


def process(target, *args):
    "A process of its own, forked from one that has imported torch and done nothing with it."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["musicgen.train"])
    started = context.Process(target=target, args=args)
    started.start()
    return started


def finish(started, seconds: float = 120) -> int:
    "The exit status of a process, when it has ended."
    started.join(seconds)
    assert started.exitcode is not None, f"it did not end within {seconds} s"
    return started.exitcode


# Kills.


def train_at(folder):
    train(Layout(folder), **RUN)


def epochs_done(layout: Layout) -> int:
    return len(layout.history.read_text().splitlines()) - 1 if layout.history.exists() else 0


def wait_for_start(started, layout: Layout):
    "Returns when a training has opened its events, or has ended."
    while not layout.events.exists() and started.exitcode is None:
        time.sleep(0.005)


def kill_after(layout: Layout, seconds: float) -> bool:
    "Trains, and kills the process after so long; whether that fell into an epoch."
    started = process(train_at, str(layout.root))
    wait_for_start(started, layout)
    started.join(seconds)
    if started.exitcode is not None:
        return False
    started.kill()
    if (status := finish(started)) == 0:
        return False  # it ended before the signal came
    assert status == -signal.SIGKILL
    return epochs_done(layout) < RUN["rounds"]


@posix
def test_a_training_killed_at_random_moments_ends_with_the_same_bits(root, tmp_path):
    "kill -9 until it has fallen into an epoch, from the beginning, MUSICGEN_KILLS times."
    whole = copy_of(root, tmp_path / "whole")
    started = process(train_at, str(whole.root))
    wait_for_start(started, whole)
    began = time.monotonic()
    assert finish(started) == 0
    seconds, expected = time.monotonic() - began, torch.load(whole.last, weights_only=True)
    seed = int(time.time())
    print(f"seed {seed}, uninterrupted {seconds:.1f} s")  # pytest shows it when a test fails
    rng, misses, saved = np.random.default_rng(seed), 0, []
    for k in range(KILLS):
        here = copy_of(root, tmp_path / f"{k}")
        while not kill_after(here, float(rng.uniform(0, seconds))):
            misses += 1
            assert misses < 20 * KILLS, f"seed {seed}: the kills do not fall into an epoch"
            shutil.rmtree(here.root)
            copy_of(root, here.root)  # it had ended before
        saved.append(epochs_done(here))
        assert finish(process(train_at, str(here.root))) == 0 and epochs_done(here) == RUN["rounds"]
        assert same(torch.load(here.last, weights_only=True), expected), (
            f"seed {seed}, repetition {k}"
        )
        assert here.weights.read_bytes() == whole.weights.read_bytes()
        assert here.history.read_bytes() == whole.history.read_bytes()
        shutil.rmtree(here.root)
    print(f"{KILLS} kills in an epoch, with {saved} epochs saved; {misses} others")


def test_the_counter_check_of_the_kills(root, tmp_path):
    "Another seed, other bits: the comparison can fail."
    one, other = copy_of(root, tmp_path / "one"), copy_of(root, tmp_path / "other")
    small = RUN | dict(notes=512, rounds=1)
    train(one, **small)
    train(other, **small, seed=1)
    assert not same(*(torch.load(x.last, weights_only=True)["model"] for x in (one, other)))


# Checkpoints.


def learn_on_full_disk(folder, checkpoint, size, sentences):
    "Resumes a run on a disk where no file may grow beyond a size."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    try:
        learn(Layout(folder), checkpoint)
    except Rejection as e:
        sentences.send(e.sentence)
    sentences.close()


@posix
def test_a_full_disk_leaves_the_last_good_checkpoint(root, reference, tmp_path):
    "One sentence; and with room again the run ends as one that was never interrupted."
    path = tmp_path / "run" / "last.pt"
    learn(root, path, after=lambda model, number: True)
    good = path.read_bytes()
    for size in (2000, len(good) - 10):
        receiver, sender = multiprocessing.get_context("forkserver").Pipe(duplex=False)
        assert finish(process(learn_on_full_disk, str(root.root), path, size, sender)) == 0
        sender.close()
        sentence = receiver.recv()
        assert str(path) in sentence and "the last good one stands" in sentence, sentence
        assert path.read_bytes() == good and os.listdir(path.parent) == ["last.pt"]
    assert same(learn(root, path), reference)


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(root, reference, tmp_path):
    def poison(model, number):
        for p in model.parameters() if number == 1 else ():
            p.data.fill_(float("nan"))

    path = tmp_path / "last.pt"
    with pytest.raises(
        Rejection, match="loss became nan in epoch 3, step 1, .*last good checkpoint stands"
    ):
        learn(root, path, after=poison)
    assert len(torch.load(path, weights_only=True)["history"]) == 2
    assert same(learn(root, path), reference)


def test_the_checkpoint_of_another_run_is_not_resumed(root, reference, tmp_path):
    "Other settings, another shape: the run begins at its beginning."
    path = tmp_path / "last.pt"
    for other in (
        dict(settings=TrainingSettings(rounds=2, steps=3, batch=4, length=16)),
        dict(hidden=24),
    ):
        learn(root, path, **other)
        history, weights = learn(root, path)
        assert same((history, weights), reference) and len(history) == SETTINGS.rounds


def test_a_damaged_checkpoint_is_one_sentence(root, tmp_path):
    "Cut off, empty, foreign: never a run that silently begins again."
    path = tmp_path / "last.pt"
    learn(root, path, after=lambda model, number: True)
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
        with pytest.raises(Rejection, match="remove it to begin again") as rejection:
            learn(root, path)
        sentence = rejection.value.sentence
        assert str(path) in sentence and "remove it" in sentence and len(sentence) < 400, sentence
        assert path.read_bytes() == broken
    path.write_bytes(good)
    assert len(learn(root, path)[0]) == SETTINGS.rounds


# bfloat16.


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_training_in_bfloat16(root, reference):
    """Forced, whatever this processor is: the loss is nearly that of float32, and weights stay
    float32. (The LSTM of oneDNN knows bfloat16 only on processors that are fast at it.)"""
    with torch.backends.mkldnn.flags(enabled=False):
        history, weights = learn(root, settings=replace(SETTINGS, bf16=True))
    plain = learn(root, settings=replace(SETTINGS, bf16=False))
    assert not same(weights, plain[1]) and {w.dtype for w in weights.values()} == {torch.float32}
    for one, two in zip(history, plain[0], strict=True):
        assert abs(one["valid"] / two["valid"] - 1) < 0.02, (one, two)
    assert history[-1]["valid"] < history[0]["valid"]


# Progress.


def read_events(folder) -> dict[str, list[tuple[int, float]]]:
    "The scalars of all files of TensorBoard in a folder: tag -> (step, value)."
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length, its checksum, an event, its checksum
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
            at += 16 + size
    return scalars


def test_tensorboard_reads_the_run(root, tmp_path):
    history, _ = learn(root, events=tmp_path / "events")
    scalars = read_events(tmp_path / "events")
    assert set(scalars) == {
        "train/loss",
        "train/learning_rate",
        "train/notes_per_second",
        "valid/nats",
    }
    assert [step for step, _ in scalars["valid/nats"]] == [12, 24, 36]
    assert np.allclose(
        [x for _, x in scalars["valid/nats"]], [line["valid"] for line in history], atol=1e-4
    )
    assert [step for step, _ in scalars["train/loss"]] == [10, 20, 30]
    assert np.allclose(
        [x for _, x in scalars["train/learning_rate"]], [SETTINGS.rate(s) for s in (9, 19, 29)]
    )
    assert all(speed > 0 for _, speed in scalars["train/notes_per_second"])


# Several processes on one model.

SPREAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_learning import Layout, learn, same
torch.distributed.init_process_group("gloo")
rank, root, out = torch.distributed.get_rank(), Layout(sys.argv[2]), sys.argv[3]
history, weights = learn(root)
learn(root, out + "/last.pt", after=lambda model, number: True)
torch.distributed.barrier()
again = same(learn(root, out + "/last.pt"), (history, weights))
torch.save(dict(history=history, weights=weights, again=again), f"{out}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_learn_one_model(root, reference, tmp_path):
    "With torchrun over the loopback: one model, the loss of a single process, and it resumes."
    (tmp_path / "spread.py").write_text(SPREAD)
    here = os.path.dirname(os.path.abspath(__file__))
    args = [
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "2",
        tmp_path / "spread.py",
        here,
        root.root,
        tmp_path,
    ]
    loopback = dict(GLOO_SOCKET_IFNAME="lo") if sys.platform == "linux" else {}
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, args)],
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | loopback | dict(OMP_NUM_THREADS="1"),
    )
    assert process.returncode == 0, process.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second), "both hold the same model"
    assert first["again"], "stopped after an epoch and resumed, it ends with the same bits"
    history, weights = reference
    assert not same(weights, first["weights"]), "the counter-check: they did not each run alone"
    for one, two in zip(history, first["history"], strict=True):
        assert abs(one["valid"] / two["valid"] - 1) < 0.05, (one, two)


# Several processes on one study.


def trials_of(layout: Layout) -> list:
    "The trials of the only study of a root."
    import optuna

    (study,) = optuna.study.get_all_study_summaries(f"sqlite:///{layout.study}")
    return optuna.load_study(
        study_name=study.study_name, storage=f"sqlite:///{layout.study}"
    ).get_trials()


@pytest.fixture(scope="module")
def tuned(root, tmp_path_factory) -> Layout:
    "The small study, by one process that is never interrupted."
    layout = untuned(root, tmp_path_factory.mktemp("tuned") / "root")
    tune(layout, **STUDY)
    return layout


def untuned(root, path) -> Layout:
    "A copy of the root without its study."
    here = copy_of(root, path)
    shutil.rmtree(here.tune)
    return here


def check_study(layout: Layout, tuned: Layout):
    "Every point has one result, and the same as in the study that was never interrupted."
    ends = Counter(
        str(t.params) for t in trials_of(layout) if t.state.name in ("COMPLETE", "PRUNED")
    )
    assert len(ends) == 4 and set(ends.values()) == {1}, ends
    assert not [t for t in trials_of(layout) if t.state.name in ("RUNNING", "WAITING")]
    assert layout.best.read_bytes() == tuned.best.read_bytes()
    assert layout.trials.read_bytes() == tuned.trials.read_bytes()


def test_the_number_of_workers_changes_no_byte(root, tuned, tmp_path):
    here = untuned(root, tmp_path / "root")
    tune(here, **STUDY, workers=2)
    check_study(here, tuned)
    assert not [t for t in trials_of(here) if t.state.name == "FAIL"]
    assert json.loads(here.best.read_text())["learning_rate"] in (0.002, 0.005)


def tune_at(folder, workers):
    tune(Layout(folder), **STUDY, workers=workers)


@posix
@pytest.mark.parametrize("workers", [1, 2])
def test_a_tuning_killed_in_a_trial_loses_none_and_repeats_none(root, tuned, tmp_path, workers):
    "Two workers outlive the process that is killed, and finish their trials."
    here = untuned(root, tmp_path / "root")
    started = process(tune_at, str(here.root), workers)
    until = time.monotonic() + 120
    while not list(here.tune.glob("*.*.lock")):  # a trial is running
        assert time.monotonic() < until and started.exitcode is None
        time.sleep(0.005)
    started.kill()
    assert finish(started) == -signal.SIGKILL and not here.best.exists()
    tune(here, **STUDY)
    check_study(here, tuned)


def test_two_tunings_of_one_root_share_the_work(root, tuned, tmp_path):
    here = untuned(root, tmp_path / "root")
    both = [process(tune_at, str(here.root), 1) for _ in range(2)]
    assert [finish(started) for started in both] == [0, 0]
    check_study(here, tuned)


def test_tpe_prunes_bad_trials(root, tmp_path):
    "A pruned trial is a result: it has its loss, and it is not run again."
    here = untuned(root, tmp_path / "root")
    wide = STUDY | dict(learning_rates="0.00001,0.01", notes=1024, sampler="tpe", trials=8)
    trials = tune(here, **wide)
    ends = [t["end"] for t in trials]
    assert len(trials) == 8 == len(trials_of(here)) and 3 <= ends.count("complete") < 8
    assert ends == sorted(ends) and all(t["loss"] for t in trials)  # complete, then pruned
    early = [t for t in trials_of(here) if t.state.name == "PRUNED"]
    assert early and all(1 <= len(t.intermediate_values) < 4 for t in early)
    assert tune(here, **wide) == trials and len(trials_of(here)) == 8
