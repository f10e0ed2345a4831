"""New metrics of an old study: computed from its stored answers, without the model.

Every evaluation left its answers on the disk (`lm.emergence.metrics`). `rescore` reads them again
and gives rows like those of the table, so a metric that was thought of later is drawn, compared and
judged beside the ones that were there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.config import UserError
from lm.emergence import metrics, table
from lm.emergence.metrics import Answers, Measure
from lm.rundir import AnyPath

if TYPE_CHECKING:
    import pandas as pd

Score = Callable[[Answers], Mapping[str, Measure]]


def rescore(workdir: AnyPath, score: Score = metrics.score, last: bool = True) -> "pd.DataFrame":
    """A row for every measure that `score` makes of every stored evaluation (`last`: of the last
    one of each replica only), in the columns of the table; `chance` stays where the name does.

    >>> rescore("runs/desk", lambda a: {"first_token": metrics.ratio(...)})    # doctest: +SKIP

    Raises UserError if no answers are stored.
    """
    import pandas as pd

    frame = table.load(workdir)
    known = frame[frame["metric"] == "exact_match"]
    if last:
        final = known.groupby(["point", "replica"])["step"].transform("max")
        known = known[known["step"] == final]
    rows: list[dict[str, Any]] = []
    for (cell, step, point, replica), group in known.groupby(["cell", "step", "point", "replica"]):
        path = Path(workdir) / cell / metrics.answers_file(step, point, replica)
        if not path.exists():
            continue
        answers = metrics.load(path)
        for row in group.to_dict("records"):
            found = score(answers[f"{row['task']}.{row['level']}.{row['format']}"])
            for name, m in found.items():
                about = {"metric": name, "value": m.value, "stderr": m.stderr, "n": m.n}
                about["chance"] = row["chance"] if name == row["metric"] else float("nan")
                rows.append({str(key): value for key, value in row.items()} | about)
    if not rows:
        raise UserError(f"{workdir} has no stored answers; give the workdir of a study that ran")
    return pd.DataFrame(rows, columns=list(table.COLUMNS))
