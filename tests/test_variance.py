"""Variance components: planted ones come back, absent ones are zero."""

import numpy as np
import pandas as pd
import pytest

from lm.config import UserError
from lm.emergence import variance

PLANTED = {"size": 0.5, "seed": 0.3, "format": 0.4, "item": 0.6, "size:item": 0.2}


def table(rng, planted, shape=(6, 4, 5, 60), rest=0.5):
    """Normal outcomes [size, seed, format, item] with planted standard deviations."""
    axes = {"size": (0,), "seed": (0, 1), "format": (2,), "item": (3,), "size:item": (0, 3)}
    y = rng.normal(0, rest, shape)
    for name, deviation in planted.items():
        own = [n if axis in axes[name] else 1 for axis, n in enumerate(shape)]
        y = y + rng.normal(0, deviation, own)
    return y


def long(y):
    index = pd.MultiIndex.from_product([range(n) for n in y.shape], names=variance.FACTORS)
    return pd.Series(np.ravel(y), index, name="value").reset_index()


def test_planted_components_are_recovered_and_covered():
    """Catches an effect with another's weight, and intervals that know of the rest alone."""
    rng = np.random.default_rng(0)
    found = [variance.decompose(table(rng, PLANTED)) for _ in range(60)]
    for name, deviation in {**PLANTED, "rest": 0.5}.items():
        each = [one.of(name) for one in found]
        mean = np.mean([c.variance for c in each])
        scatter = np.std([c.variance for c in each]) / 60**0.5
        assert mean == pytest.approx(deviation**2, abs=3.5 * scatter)
        covered = np.mean([c.ci.low <= deviation**2 <= c.ci.high for c in each])
        assert covered > 0.85


def test_absent_components_are_zero_and_flagged_as_often_as_not():
    """Catches a negative estimate that is clipped in silence, or a null that is found."""
    rng = np.random.default_rng(1)
    found = [variance.decompose(table(rng, {"item": 0.5}, (4, 3, 5, 40))) for _ in range(60)]
    for name in ("size", "seed", "format", "seed:format"):
        each = [one.of(name) for one in found]
        assert np.mean([c.variance for c in each]) < 0.003
        assert 0.2 < np.mean([c.negative for c in each]) < 0.9
        assert all(c.variance == 0 for c in each if c.negative)
        assert np.mean([c.ci.low > 0 for c in each]) < 0.1


def test_a_seed_belongs_to_its_size():
    """Catches seeds crossed with sizes: seed 0 of two sizes has nothing in common but its name."""
    y = np.zeros((3, 2, 1, 4))
    y[:, :, 0, :] = np.array([[0.0, 1], [1, 0], [0, 1]])[..., None]
    found = variance.decompose(y)
    assert found.of("seed").variance == pytest.approx(0.5) and found.of("size").negative
    assert {c.effect for c in found.components} == {"size", "seed", "item", "size:item", "rest"}


def test_degrees_of_freedom_and_shares_add_up():
    y = table(np.random.default_rng(0), PLANTED, (3, 4, 5, 6))
    found = variance.decompose(y)
    assert sum(c.freedom for c in found.components) == y.size - 1
    assert sum(c.share for c in found.components) == pytest.approx(1)
    assert found.of("seed").freedom == 3 * 3 and found.of("seed:item").freedom == 9 * 5


def test_the_long_form_is_that_table():
    """Catches seeds told apart by name over sizes, and missing items that become zeros."""
    y = table(np.random.default_rng(0), PLANTED, (3, 2, 2, 8))
    frame = long(y)
    want = variance.decompose(y)
    assert variance.components(frame) == want
    renamed = frame.assign(seed=frame["seed"] + 10 * frame["size"])
    assert variance.components(renamed.sample(frac=1, random_state=0)) == want
    holes = frame[~((frame["item"] == 3) & (frame["size"] == 1) & (frame["seed"] == 0))]
    more = pd.concat([holes, frame[frame["size"] == 2].assign(seed=frame["seed"] + 5)])
    found = variance.components(more)
    assert found.counts == {"size": 3, "seed": 2, "format": 2, "item": 7}
    assert found.dropped == len(more) - 3 * 2 * 2 * 7
    assert variance.components(frame[frame["format"] == 0].drop(columns="format")).counts == {
        **{"size": 3, "seed": 2, "format": 1, "item": 8}
    }


def test_bad_input_is_one_sentence_and_equal_outcomes_are_no_accident():
    same = variance.decompose(np.ones((2, 2, 2, 2)))
    assert same.total == 0 and not any(c.negative for c in same.components)
    frame = long(np.random.default_rng(0).normal(size=(2, 2, 2, 3)))
    for bad in (
        frame[:0],
        pd.concat([frame, frame]),
        frame.assign(value=np.nan),
        frame[(frame["format"] == 0) | (frame["size"] == 0)],
        frame[(frame["item"] == 0) & (frame["format"] == 0) & (frame["size"] == 0)][:1],
        frame[frame["item"] == 4 - frame["size"] * 2 - frame["format"]],
    ):
        with pytest.raises(UserError):
            variance.components(bad)
    with pytest.raises(UserError):
        variance.decompose(np.ones((1, 1, 1, 1)))
