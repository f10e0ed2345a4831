"""Does the analysis find onsets that theory plants? Multitask sparse parity, a positive control.

Command   lm run experiments/parity.py --workdir=runs/parity
Cost      three minutes of one core, and a minute for the page (--config.scale=smoke: half a minute)
Expected  every task is at its chance of 1/2 and then, within a factor of two in parameters, solved;
          frequent tasks first. Of 24 tasks 0, 0-1, 1, 2-3, 2-4, 5-7 and 11-12 are learned (accuracy
          above .9) at 101, 201, 401, 801, 1601, 3201 and 6401 parameters. The mean of their losses,
          weighted by frequency, is near a power law all the same, N^-0.46 between 401 and 3201.
          Tasks 3 to 20 are `emergent`; the first ones have too few sizes below their onset.

The quanta hypothesis (Michaud et al. 2023) in its own toy world (experiments/quanta.py). Task i of
24 is asked with probability ~ (i + 1)^-1.4, so a network with room for m tasks learns the first m,
and the mean loss that is left is ~ m^-0.4: N^-0.4 where m ~ N. Smooth in the mean, a jump in each.

Networks have 50 w + 1 parameters and are initialised as in that paper's code. Data are fresh at
every step. A replica's data seed draws the bits of its tasks and its stream, so that what is found
does not hang on one draw of tasks; a seed has the same tasks at every size.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import quanta
from experiments.own import Plan, Record
from experiments.quanta import Settings, TaskConfig
from lm.config import UserError, build
from lm.emergence.metrics import Measure
from lm.train.cell import Axis, Replica
from lm.train.record import params_sha256

if TYPE_CHECKING:
    import pandas as pd

WIDTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SMOKE = (2, 8, 32)
LAW = (401, 801, 1601, 3201)  # parameters; above them few of the 24 tasks are left to learn
CHANCE = 0.5
LEARNED = 0.9  # accuracy above which a task counts as learned
# Seconds of a step of one replica on one core of a 2025 server: of the step, and of each width.
STEP_SECONDS, WIDTH_SECONDS = 17e-6, 0.45e-6
COMPILE_SECONDS, EVAL_SECONDS = 3.0, 0.02  # of a cell; of all tasks of a replica, with their rows


def get_config() -> ConfigDict:
    """Everything that all points share."""
    c = ConfigDict()
    c.scale = "full"  # or "smoke"
    c.widths = WIDTHS
    c.task = ConfigDict({"tasks": 24, "bits": 24, "k": 3, "zipf": 1.4})
    c.model = ConfigDict({"width": 16})
    c.optim = ConfigDict({"learning_rate": 3e-3})
    c.train = ConfigDict({"steps": 12_000, "batch": 512, "chunk": 100})
    c.eval = ConfigDict({"items": 2048, "first": 100})
    c.seeds = ConfigDict({"replicas": 8, "first": 0, "vary": ("init", "data"), "eval": 0})
    return c


def points(config: ConfigDict) -> list[dict]:
    """One point per width; `scale` "smoke" keeps three with two seeds and a sixth of the steps."""
    if config.scale == "full":
        return [{"name": f"w{width}", "model.width": width} for width in config.widths]
    if config.scale == "smoke":
        less = {"seeds.replicas": 2, "train.steps": config.train.steps // 6}
        return [{"name": f"w{width}", "model.width": width} | less for width in SMOKE]
    raise UserError(f"scale is {config.scale!r}; use 'full' or 'smoke'")


def plan(config: ConfigDict, point: Mapping[str, Any]) -> Plan:
    """What a width will be and cost."""
    s = settings(config)
    name, role = point["name"], point.get("role", "ladder")
    width, task = s.model.width, s.task
    replicas = []
    for index in range(s.seeds.replicas):
        seeds: dict[str, Any] = {
            axis: s.seeds.first + index * (axis in s.seeds.vary) for axis in get_args(Axis)
        }
        seeds |= {"eval": s.seeds.eval, "learning_rate": s.optim.learning_rate}
        replicas.append(Replica(name, role, index, **seeds))
    params = width * (task.tasks + task.bits + 2) + 1
    each = (STEP_SECONDS + WIDTH_SECONDS * width) * s.train.batch / 512
    seconds = s.steps * each + len(s.eval_steps) * EVAL_SECONDS
    return Plan(
        *(name, role, 1, width, params, params, s.steps, s.train.batch),
        flops_per_token=6.0 * width * (task.bits + 1),
        seconds=COMPILE_SECONDS + len(replicas) * seconds,
        replicas=tuple(replicas),
        tasks=tuple(
            {"task": "parity", "level": str(level), "format": 0, "chance": CHANCE}
            for level in range(task.tasks)
        ),
    )


def settings(config: ConfigDict) -> Settings:
    """The groups of a point's config as strict records; raises `UserError`."""
    groups = {k: v for k, v in config.to_dict().items() if isinstance(v, Mapping)}
    return build(Settings, groups)


def train(config: ConfigDict, plan: Plan, record: Record) -> list[str | None]:
    """Trains all replicas of one width; the SHA-256 of each one's parameters."""
    s = settings(config)
    tick = time.monotonic()
    masks = jnp.asarray(np.stack([quanta.draw_masks(s.task, who.data) for who in plan.replicas]))
    states, keys = quanta.start(s, plan.replicas)
    words = quanta.test_words(s)
    program = jax.jit(quanta.population_run(s), donate_argnums=0)
    run = program.lower(states, keys, masks, 0).compile()
    score = jax.jit(quanta.population_logits).lower(states[0], words).compile()
    record.seconds["compile"] = time.monotonic() - tick
    labels = np.asarray(quanta.parity(words & masks[:, :, None]))
    due = s.eval_steps
    for step in range(s.train.chunk, s.steps + 1, s.train.chunk):
        tick = time.monotonic()
        states, loss = run(states, keys, masks, step - s.train.chunk)
        found = np.asarray(loss, np.float64)
        record.seconds["train"] += time.monotonic() - tick
        finite = np.isfinite(found)
        record.progress(step, float(found[finite].mean()) if finite.any() else math.nan)
        if step in due:
            tick = time.monotonic()
            logits = np.asarray(score(states[0], words), np.float64)
            for who, z, y, mean in zip(plan.replicas, logits, labels, found, strict=True):
                evaluate(record, s.task, who, step, z, y)
                measured = {"loss": Measure(float(mean), math.nan, s.train.chunk)}
                record.measure(who, step, "train", "mixture", measured)
            record.seconds["eval"] += time.monotonic() - tick
    params = [jax.tree.map(lambda leaf, i=i: leaf[i], states[0]) for i in range(len(plan.replicas))]
    alive = [all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(p)) for p in params]
    return [params_sha256(p) if ok else None for p, ok in zip(params, alive, strict=True)]


def evaluate(
    record: Record, task: TaskConfig, who: Replica, step: int, z: np.ndarray, y: np.ndarray
) -> None:
    """Rows of every task and of the mean by frequency, from logits and labels [tasks, items]."""
    losses = []
    for level, (logits, labels) in enumerate(zip(z, y, strict=True)):
        found = quanta.measures(logits, labels)
        losses.append(found["nll"])
        record.measure(who, step, "parity", str(level), found, CHANCE)
    share = task.frequency
    value = float(share @ [m.value for m in losses])
    error = float(np.sqrt(share**2 @ np.square([m.stderr for m in losses])))
    mean = {"nll": Measure(value, error, sum(m.n for m in losses))}
    record.measure(who, step, "parity_mean", "zipf", mean)


def summary(frame: "pd.DataFrame", sizes: Sequence[int] = LAW) -> dict[str, Any]:
    """Learned tasks of every seed and mean loss (SD) by parameters, and the slope of ln mean loss
    on ln parameters over `sizes` with a 95% bootstrap interval over seeds.

    The rows are those of a finished run; a seed is resampled with all its sizes, since it has the
    same tasks in them.
    """
    final = frame[frame["step"] == frame.groupby("point")["step"].transform("max")]
    exact = final[(final["task"] == "parity") & (final["metric"] == "exact_match")]
    through = exact.assign(learned=exact["value"] > LEARNED)
    counts = through.groupby(["params", "replica"])["learned"].sum().unstack()
    mean = final[final["task"] == "parity_mean"].pivot(
        index="params", columns="replica", values="value"
    )
    inside = mean.loc[list(sizes)]
    x = np.log(inside.index.to_numpy(float))

    def slope(columns: np.ndarray) -> float:
        return float(np.polyfit(x, np.log(inside.to_numpy()[:, columns].mean(1)), 1)[0])

    seeds = inside.shape[1]
    rng = np.random.default_rng(0)
    draws = [slope(rng.integers(seeds, size=seeds)) for _ in range(2000)]
    return {
        "learned": {int(n): row.astype(int).tolist() for n, row in counts.iterrows()},
        "nll": {int(n): (row.mean(), row.std()) for n, row in mean.iterrows()},
        "slope": slope(np.arange(seeds)),
        "ci95": np.quantile(draws, [0.025, 0.975]).tolist(),
    }


if __name__ == "__main__":
    from lm.emergence.table import load

    found = summary(load(sys.argv[1]))
    for size, learned in found["learned"].items():
        print(f"{size:5d}  {learned}  nll {{:.3f}} ({{:.3f}})".format(*found["nll"][size]))
    print("slope {:.3f}, 95% {:.3f} to {:.3f}".format(found["slope"], *found["ci95"]))
