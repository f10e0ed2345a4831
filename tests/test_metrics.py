"""Metrics of stored answers against sums written out by hand, and the file they come from."""

import hashlib
import time

import numpy as np
import pytest

from lm.emergence.metrics import METRICS, PAD, Answers, load, save, score


def answers(seed=0, n=50, longest=4, vocab=11):
    """Answers of a made-up model, and its whole distribution [n, A, V] to check against."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(vocab, 0.2), (n, longest))
    target = rng.integers(vocab, size=(n, longest))
    target = np.where(rng.uniform(size=target.shape) < 0.7, p.argmax(-1), target)
    length = rng.integers(1, longest + 1, n)
    real = np.arange(longest) < length[:, None]
    logprob = np.log(np.take_along_axis(p, target[..., None], -1)[..., 0])
    stored = Answers(
        np.where(real, target, PAD).astype(np.int32),
        np.where(real, logprob, 7.0).astype(np.float32),  # nonsense where padded: must not count
        p.argmax(-1).astype(np.int32),
        (p**2).sum(-1).astype(np.float32),
    )
    return stored, p, target, length


def test_every_metric_equals_a_loop_over_items():
    """Fails if padding counts, tokens are averaged per item first, or Brier forgets a term."""
    stored, p, target, length = answers()
    hits, exact, totals, brier, tokens = 0, 0, [], 0.0, 0
    for i in range(len(length)):
        right = [p[i, t].argmax() == target[i, t] for t in range(length[i])]
        hits, exact, tokens = hits + sum(right), exact + all(right), tokens + length[i]
        totals.append(sum(np.log(p[i, t, target[i, t]]) for t in range(length[i])))
        for t in range(length[i]):
            brier += ((p[i, t] - np.eye(p.shape[-1])[target[i, t]]) ** 2).sum()
    found = score(stored)
    assert tuple(found) == METRICS
    expected = (exact / 50, hits / tokens, -sum(totals) / tokens, np.mean(totals), brier / tokens)
    assert [m.value for m in found.values()] == pytest.approx(expected, rel=1e-5)
    assert {m.n for m in found.values()} == {50}


def test_standard_errors_are_those_of_a_bootstrap_over_items():
    """Fails if tokens of one answer are taken as independent, or n is counted in tokens."""
    stored, *_ = answers(n=400)
    rng = np.random.default_rng(1)
    draws = {name: [] for name in METRICS}
    for _ in range(400):
        pick = rng.integers(400, size=400)
        arrays = (stored.target, stored.logprob, stored.greedy, stored.square)
        for name, measure in score(Answers(*(a[pick] for a in arrays))).items():
            draws[name].append(measure.value)
    for name, measure in score(stored).items():
        assert measure.stderr == pytest.approx(np.std(draws[name]), rel=0.15), name


def test_a_certain_and_right_model_scores_perfectly():
    """Fails if any metric has an offset: Brier 0, loss 0, all exact."""
    target = np.array([[3, 1], [2, PAD]], np.int32)
    zeros, ones = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    values = [m.value for m in score(Answers(target, zeros, target, ones)).values()]
    assert values == [1, 1, 0, 0, 0]


def test_one_item_has_no_standard_error():
    one = np.zeros((1, 1), np.int32)
    zero = np.zeros((1, 1), np.float32)
    assert all(np.isnan(m.stderr) for m in score(Answers(one, zero, one, zero)).values())


def test_an_impossible_target_costs_infinitely_and_spoils_nothing_else():
    """Fails if -inf raises, warns, or turns another metric into NaN."""
    zero = np.zeros((2, 1), np.int32)
    logprob = np.array([[-np.inf], [0.0]], np.float32)
    found = score(Answers(zero, logprob, zero, np.ones((2, 1), np.float32)))
    assert found["nll"].value == np.inf
    assert found["exact_match"].value == 1 and found["brier"].value == 1


def test_files_come_back_and_are_the_same_bytes_at_another_time(tmp_path):
    """Fails if the archive records when it was written, or the order of its keys matters."""
    a, b = answers(0)[0], answers(1)[0]
    save(tmp_path / "one.npz", {"recall.5": a, "addition.1": b})
    time.sleep(2.1)  # zip keeps time in steps of two seconds
    save(tmp_path / "two.npz", {"addition.1": b, "recall.5": a})
    one, two = ((tmp_path / f"{name}.npz").read_bytes() for name in ("one", "two"))
    assert hashlib.sha256(one).digest() == hashlib.sha256(two).digest()
    back = load(tmp_path / "one.npz")
    assert set(back) == {"recall.5", "addition.1"}
    assert back["recall.5"].logprob.tobytes() == a.logprob.tobytes()
    assert back["recall.5"].target.dtype == np.int32


def test_arrays_that_do_not_fit_together_are_refused():
    """Fails if a padded-out item or a wrong shape reaches a metric as 0/0."""
    good = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"must all be \[n, A\]"):
        Answers(good, np.zeros((2, 2), np.float32), good, good)
    with pytest.raises(ValueError, match="no answer token"):
        Answers(np.full((2, 3), PAD, np.int32), good, good, good)
