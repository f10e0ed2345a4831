"""Metrics of stored answers against sums written out by hand, and the file they come from."""

import hashlib
import time

import numpy as np
import pytest

from lm.emergence.metrics import DTYPES, METRICS, PAD, Answers, load, save, score


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
        np.log(p.max(-1)).astype(np.float32),
        np.where(real, rng.integers(vocab, size=target.shape), PAD).astype(np.int32),
        # The right choice first; the last item has one choice less than the others.
        np.where(np.arange(3) < 3 - (np.arange(n)[:, None] == n - 1), np.log(p[:, 0, :3]), -np.inf),
    )
    return stored, p, target, length


def test_every_metric_equals_a_loop_over_items():
    """Fails if padding counts, tokens are averaged per item first, or Brier forgets a term."""
    stored, p, target, length = answers()
    hits, exact, totals, brier, tokens = 0, 0, [], 0.0, 0
    similar, independent, bins, right_choice, choice_brier = 0.0, 0.0, {}, 0, 0.0
    for i in range(len(length)):
        right = [p[i, t].argmax() == target[i, t] for t in range(length[i])]
        hits, exact, tokens = hits + sum(right), exact + all(right), tokens + length[i]
        totals.append(sum(np.log(p[i, t, target[i, t]]) for t in range(length[i])))
        for t in range(length[i]):
            brier += ((p[i, t] - np.eye(p.shape[-1])[target[i, t]]) ** 2).sum()
            bins.setdefault(int(10 * p[i, t].max()), []).append(right[t] - p[i, t].max())
        similar += 1 - edits(stored.decoded[i, : length[i]], target[i, : length[i]]) / length[i]
        q = p[i, 0, : 2 if i == 49 else 3]
        q = q / q.sum()
        right_choice += q.argmax() == 0
        choice_brier += (q[0] - 1) ** 2 + (q[1:] ** 2).sum()
    independent = np.mean((hits / tokens) ** length)
    found = score(stored)
    assert tuple(found) == METRICS
    expected = (
        *(exact / 50, hits / tokens, independent, similar / 50),
        *(-sum(totals) / tokens, np.mean(totals), np.mean(np.exp(totals)), brier / tokens),
        *(right_choice / 50, choice_brier / 50),
        sum(abs(sum(off)) for off in bins.values()) / tokens,
    )
    assert [m.value for m in found.values()] == pytest.approx(expected, rel=1e-5)
    assert {m.n for name, m in found.items() if name != "calibration_error"} == {50}
    assert found["calibration_error"].n == tokens


def edits(a, b):
    """Levenshtein's distance, from its definition."""
    if len(a) == 0 or len(b) == 0:
        return max(len(a), len(b))
    swap = edits(a[1:], b[1:]) + (a[0] != b[0])
    return min(swap, edits(a[1:], b) + 1, edits(a, b[1:]) + 1)


def test_metrics_that_say_nothing_new_are_left_out():
    """Fails if one-token answers get an edit distance, or open answers a choice."""
    one = np.zeros((3, 1), np.int32)
    zero = np.zeros((3, 1), np.float32)
    found = score(Answers(one, zero, one, zero, zero, one, np.zeros((3, 0), np.float32)))
    assert not {"edit_similarity", "independent_match", "choice_accuracy"} & set(found)
    tied = np.log(np.array([[0.25, 0.25], [0.5, 0.1], [0.1, 0.5]]))
    found = score(Answers(one, zero, one, zero, zero, one, tied))
    assert found["choice_accuracy"].value == 0.5  # a tie is half a point


def test_standard_errors_are_those_of_a_bootstrap_over_items():
    """Fails if tokens of one answer are taken as independent, or n is counted in tokens."""
    stored, *_ = answers(n=400)
    rng = np.random.default_rng(1)
    draws = {name: [] for name in METRICS}
    for _ in range(400):
        pick = rng.integers(400, size=400)
        arrays = [getattr(stored, name)[pick] for name in DTYPES]
        for name, measure in score(Answers(*arrays)).items():
            draws[name].append(measure.value)
    for name, measure in score(stored).items():
        if name == "calibration_error":
            assert np.isnan(measure.stderr)
            continue
        assert measure.stderr == pytest.approx(np.std(draws[name]), rel=0.15), name


def test_a_certain_and_right_model_scores_perfectly():
    """Fails if any metric has an offset: Brier 0, loss 0, all exact."""
    target = np.array([[3, 1], [2, PAD]], np.int32)
    zeros, ones = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    values = [
        m.value
        for m in score(Answers(target, zeros, target, ones, zeros, target, zeros[:, :0])).values()
    ]
    assert values == [1, 1, 1, 1, 0, 0, 1, 0, 0]


def test_one_item_has_no_standard_error():
    one = np.zeros((1, 1), np.int32)
    zero = np.zeros((1, 1), np.float32)
    assert all(
        np.isnan(m.stderr)
        for m in score(Answers(one, zero, one, zero, zero, one, zero[:, :0])).values()
    )


def test_an_impossible_target_costs_infinitely_and_spoils_nothing_else():
    """Fails if -inf raises, warns, or turns another metric into NaN."""
    zero = np.zeros((2, 1), np.int32)
    logprob = np.array([[-np.inf], [0.0]], np.float32)
    found = score(
        Answers(zero, logprob, zero, *np.ones((2, 2, 1), np.float32), zero, logprob[:, :0])
    )
    assert found["nll"].value == np.inf
    assert found["exact_match"].value == 1 and found["brier"].value == 1


def test_files_come_back_and_are_the_same_bytes_at_another_time(tmp_path):
    """Fails if the archive records when it was written, or the order of its keys matters."""
    a, b = answers(0)[0], answers(1)[0]
    save(tmp_path / "one.npz", {"recall.5.0": a, "addition.1.0": b})
    time.sleep(2.1)  # zip keeps time in steps of two seconds
    save(tmp_path / "two.npz", {"addition.1.0": b, "recall.5.0": a})
    one, two = ((tmp_path / f"{name}.npz").read_bytes() for name in ("one", "two"))
    assert hashlib.sha256(one).digest() == hashlib.sha256(two).digest()
    back = load(tmp_path / "one.npz")
    assert set(back) == {"recall.5.0", "addition.1.0"}
    assert back["recall.5.0"].logprob.tobytes() == a.logprob.tobytes()
    assert back["recall.5.0"].target.dtype == np.int32


def test_arrays_that_do_not_fit_together_are_refused():
    """Fails if a padded-out item or a wrong shape reaches a metric as 0/0."""
    good = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"must all be \[n, A\]"):
        Answers(good, np.zeros((2, 2), np.float32), *[good] * 5)
    with pytest.raises(ValueError, match=r"choices must be \[n, C\]"):
        Answers(*[good] * 6, good[:1])
    with pytest.raises(ValueError, match="no answer token"):
        Answers(np.full((2, 3), PAD, np.int32), *[good] * 6)
