"""Collapse on loss against collapse on other axes: planted both ways, and published data."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lm.config import UserError
from lm.emergence import collapse

PYTHIA = Path(__file__).parents[2] / "shared/data/published/pythia_v1_evals.csv"
SIZES = [400, 1600, 6400, 25600, 100000]


def study(rng, of="loss", noise=0.01):
    """All rows of 5 sizes × 2 seeds × 12 evaluations; `value` is a function of one axis."""
    rows = []
    for params in SIZES:
        for replica in range(2):
            for step in range(1, 13):
                tokens = 1000 * 2**step
                loss = 1 + params**-0.2 + 8 * tokens**-0.3 + rng.normal(0, 0.005)
                where = {"loss": 4 * (1.6 - loss), "tokens": np.log2(tokens) - 16, "none": 0.0}[of]
                value = 1 / (1 + np.exp(-2 * where)) + rng.normal(0, noise)
                at = {"point": f"p{params}", "replica": replica, "step": step, "params": params}
                at |= {"tokens": tokens, "flops": 6.0 * params * tokens, "status": "ok"}
                at |= {"role": "ladder", "format": 0}
                of_text = {"task": "text", "level": "test", "metric": "nll", "value": loss}
                of_task = {"task": "t", "level": "1", "metric": "exact_match", "value": value}
                rows += [at | of_text, at | of_task]
    return pd.DataFrame(rows)


def compare(frame):
    found = collapse.compare(frame, "t", "1", "exact_match", resamples=50)
    return {one.axis: one for one in found}


@pytest.mark.parametrize(("of", "others"), [("loss", ("tokens", "flops")), ("tokens", ("loss",))])
def test_the_axis_that_decides_collapses(of, others):
    """Catches sizes that are fitted with their own points, and a fixed direction."""
    found = compare(study(np.random.default_rng(0), of))
    best = found[of]
    assert best.r2 > 0.995 and best.r2_outside > 0.98 and best.increasing == (of != "loss")
    for other in others:
        assert found[other].r2_outside < 0.9 and found[other].rmse > 3 * best.rmse
    if of == "loss":
        assert found["tokens"].excess_ci.low > 0 and found["loss"].excess_ci == (0, 0)
        assert found["tokens"].excess == pytest.approx(found["tokens"].rmse - best.rmse)
    assert found["params"].r2 < 0.7  # all evaluations of a size lie on one point
    assert all(
        one.rmse_ci.low <= one.rmse <= one.rmse_ci.high and one.worst >= one.rmse
        for one in found.values()
    )


def test_noise_collapses_on_nothing():
    """Catches R² of the flattering kind: outside the sizes that were fitted it is not above 0."""
    for one in compare(study(np.random.default_rng(1), "none")).values():
        assert one.r2_outside < 0.05


def test_pythia_collapses_on_its_perplexity():
    """Catches any other fit than that of the figures published beside the data."""
    if not PYTHIA.exists():
        pytest.skip(f"{PYTHIA.name} is not here; it is published data that the user fetches")
    rows = pd.read_csv(PYTHIA)
    rows = rows[(rows["shots"] == "zero-shot") & rows["lambada_openai_ppl"].notna()]
    x = {"loss": np.log(rows["lambada_openai_ppl"]), "tokens": rows["step"]}
    y, models = rows["lambada_openai_acc"].to_numpy(), rows["model"].to_numpy(str)
    loss, _ = collapse.collapse(x, y, models, resamples=50)
    assert (loss.n, loss.sizes) == (432, 16)
    assert loss.r2 == pytest.approx(0.99987, abs=1e-5) and loss.residual < 0.0185
    assert (loss.rmse, loss.worst) == pytest.approx((0.0054, 0.0102), abs=1e-4)
    began = (rows["step"] > 0).to_numpy()  # where tokens have a logarithm
    x = {axis: values[began] for axis, values in x.items()}
    _, tokens = collapse.collapse(x, y[began], models[began], resamples=50)
    assert tokens.r2 == pytest.approx(0.841, abs=0.001) and tokens.excess_ci.low > 0.05


def test_bad_input_is_one_sentence():
    """Catches evaluations without a text loss that are compared all the same."""
    frame = study(np.random.default_rng(0))
    text = frame["task"] == "text"
    some = frame[~(text & (frame["step"] > 6))]
    assert {one.n for one in compare(some).values()} == {5 * 2 * 6}
    doubled = compare(pd.concat([frame, frame]))
    assert doubled["loss"].n == 120
    for bad, word in (
        (frame[~text], "no exact_match"),
        (frame[frame["params"] < 2000], "2 sizes"),
        (frame.assign(value=0.5), "nothing to collapse"),
        (frame[:0], "no exact_match"),
    ):
        with pytest.raises(UserError, match=word):
            compare(bad)
    with pytest.raises(UserError, match="one length"):
        collapse.collapse({"loss": np.array([1.0])}, np.ones(3), np.ones(3))
