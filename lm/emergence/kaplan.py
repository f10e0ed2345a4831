"""The laws of Kaplan et al. (2020): loss in size, data and steps, without a limit E.

    L(N) = (Nc / N)^aN          L(D) = (Dc / D)^aD
    L(N, D) = ((Nc / N)^(aN / aD) + Dc / D)^aD                  (equation 1.5)
    L(N, S) = (Nc / N)^aN + (Sc / S)^aS                         (equation 1.6)

N counts parameters without embeddings, D tokens, S steps, C PF-days. Without E the forms hold only
far above the entropy of text; `lm.emergence.laws` has the form with it.
"""

from typing import Literal

import numpy as np
from scipy.optimize import least_squares

from lm.config import UserError

# (scale, exponent) as printed in the paper; C in PF-days and S at the efficient frontier.
CONSTANTS = {"N": (8.8e13, 0.076), "D": (5.4e13, 0.095), "C": (3.1e8, 0.050), "S": (2.1e3, 0.76)}
Form = Literal["L(N)", "L(D)", "L(N,D)", "L(N,S)"]
TIGHT = {"ftol": 1e-13, "xtol": 1e-13, "gtol": 1e-13}
_FORMS: dict[str, tuple[str, ...]] = {
    "L(N)": ("xc", "alpha"),
    "L(D)": ("xc", "alpha"),
    "L(N,D)": ("nc", "alpha_n", "dc", "alpha_d"),
    "L(N,S)": ("nc", "alpha_n", "sc", "alpha_s"),
}


def predict(form: Form, constants: dict[str, float], *size: np.ndarray) -> np.ndarray:
    """The loss at `size`, which is N, D, (N, D) or (N, S) [J]; constants as `fit` returns them."""
    theta = [c if "alpha" in k else np.log(c) for k, c in constants.items()]
    return np.exp(_log_loss(form, np.array(theta), [np.log(s) for s in size]))


def fit(form: Form, loss: np.ndarray, *size: np.ndarray) -> dict[str, float]:
    """The constants of a form by Huber's loss on ln L, from runs [J].

    Raises `UserError` where there are not more runs than constants, for values that are not
    positive and finite, and where all runs have one size or one loss.
    """
    names = _FORMS[form]
    if len(loss) <= len(names):
        need = len(names) + 1
        raise UserError(f"{form} has {len(names)} constants and {len(loss)} runs; it takes {need}")
    for name, column in zip(("loss", *form[2:-1].split(",")), (loss, *size), strict=True):
        bad = np.asarray(column)[~(np.isfinite(column) & (np.asarray(column) > 0))]
        if len(bad):
            raise UserError(f"{name} holds {bad[0]}; {form} takes finite values above 0")
        if len(column) and np.ptp(np.log(column)) < 1e-9:
            raise UserError(f"all runs have the same {name}; give runs that differ in it")
    y, logs = np.log(loss), [np.log(s) for s in size]
    found = []
    for first in (0.05, 0.1, 0.3):
        for second in (0.05, 0.1, 0.3, 0.8)[: len(names) * 2 - 3]:
            # Each term alone at the mean loss, at the middle of the runs.
            start = []
            for alpha, log in zip((first, second), logs, strict=False):
                start += [log.mean() + y.mean() / alpha, alpha]
            scale = np.array([10.0, 0.1] * (len(start) // 2))
            done = least_squares(
                lambda theta: _log_loss(form, theta, logs) - y,
                start,
                loss="huber",
                f_scale=0.01,
                x_scale=scale,
                **TIGHT,
            )
            found.append(done)
    best = min(found, key=lambda result: result.cost)
    values = [v if "alpha" in k else np.exp(v) for k, v in zip(names, best.x, strict=True)]
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _log_loss(form: str, theta: np.ndarray, logs: list[np.ndarray]) -> np.ndarray:
    """ln L of parameters (ln constant, exponent, ...) at the logs of the sizes."""
    terms = [theta[2 * i + 1] * (theta[2 * i] - log) for i, log in enumerate(logs)]
    if form == "L(N,D)":
        return theta[3] * np.logaddexp(terms[0] / theta[3], theta[2] - logs[1])
    return terms[0] if len(terms) == 1 else np.logaddexp(*terms)
