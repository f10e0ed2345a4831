"""What people read: one table a bench, and below it the ratios that matter."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm.bench.cases import ATTENTION, SMOKE_ATTENTION, AttentionCase

Row = Mapping[str, Any]
BASELINES = ("sequential", "processes")  # what a layout of replicas has to beat
SHAPES = {case.name: case for case in (*ATTENTION, *SMOKE_ATTENTION)}


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is being done, if that is a terminal."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update


def show(rows: Sequence[Row]) -> None:
    """Prints the rows of one bench."""
    from rich.console import Console

    console = Console(highlight=False)
    for line, table in ((title(rows), figures(rows)), ratios(rows), memory(rows)):
        if not table.row_count:
            continue
        # A pipe is no reason to cut columns off.
        wanted = table.__rich_measure__(console, console.options).maximum
        console.width = max(console.width, wanted)
        console.print(line, style="bold", soft_wrap=True)
        console.print(table)
    for line in notes(rows):
        console.print(line, markup=False, soft_wrap=True)


def figures(rows: Sequence[Row]) -> Any:
    """The table of all rows, case by case; `against` is how many times as fast as the baseline."""
    bench = rows[0]["bench"]
    heads = {
        "attention": ("B x N x T x H", "ms", "GFLOP/s"),
        "step": ("model", "ms a step", "tokens/s"),
        "population": ("model", "ms a step", "replica\nsteps/s"),
        "eval": ("model", "ms", "items/s"),
    }
    case, ms, rate = heads[bench]
    peers = any(row["impl"].startswith("torch_") and row["ms"] for row in rows)
    other = "separate" if bench == "population" else "PyTorch" if peers else "reference"
    columns = ["impl", ms, "min - max", rate, "of\nproduct", f"against\n{other}", "peak\nMiB"]
    table = _table([case, *columns])
    last = ""
    for row in rows:
        if last and row["case"] != last:
            table.add_section()
        name = "" if row["case"] == last else row["case"]
        table.add_row(name, row["impl"], *_cells(row, baseline(_of_case(rows, row["case"]))))
        last = row["case"]
    return table


def title(rows: Sequence[Row]) -> str:
    """What was measured, and how."""
    first = rows[0]
    threads = sorted({row["threads"] for row in rows if row["threads"]})
    what = [first["bench"]]
    if first["bench"] == "attention":
        what.append("causal " + first["pass"].replace("+", " + "))
    if first["bench"] == "eval":
        what.append(f"{first['replicas']} four-way items a repetition")
    elif first["replicas"] > 1:
        what.append(f"{first['replicas']} replicas")
    what.append(first["dtype"])
    count = max(row["n"] for row in rows)
    used = " or ".join(map(str, threads)) or "no"
    what.append(f"{used} thread{'' if threads == [1] else 's'}")
    what.append(f"medians of {count} interleaved repetitions")
    return ", ".join(what)


def baseline(rows: Sequence[Row]) -> Row | None:
    """The row of a case with which the others are compared: the fastest of PyTorch's, the faster
    layout of before, or `reference`.
    """
    if rows[0]["bench"] == "population":
        return fastest([row for row in rows if row["impl"] in BASELINES])
    torch = fastest([row for row in rows if row["impl"].startswith("torch_")])
    return torch or fastest([row for row in rows if row["impl"] == "reference"])


def fastest(rows: Sequence[Row]) -> Row | None:
    """The row with the smallest median; None if nothing ran."""
    ran = [row for row in rows if row["ms"]]
    return min(ran, key=_median) if ran else None


def speedups(rows: Sequence[Row], impl: str, other: str) -> dict[str, float]:
    """How many times as fast as `other` an implementation is, per case that both ran."""
    medians = {(row["case"], row["impl"]): _median(row) for row in rows if row["ms"]}
    cases = [case for case, name in medians if name == impl and (case, other) in medians]
    return {case: medians[case, other] / medians[case, impl] for case in cases}


def mean(values: Sequence[float]) -> float | None:
    """The geometric mean; None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def ratios(rows: Sequence[Row]) -> tuple[str, Any]:
    """Attention's geometric means per group of cases, and the worst case."""
    impls = list(dict.fromkeys(row["impl"] for row in rows if row["ms"]))
    columns = ["against", "the large", "the tiny", "T >= 1024", "worst"]
    table = _table(["impl", *columns])
    for other in ("torch_sdpa", "reference"):
        for impl in impls:
            found = speedups(rows, impl, other) if impl not in (other, "torch_sdpa") else {}
            found = {n: x for n, x in found.items() if n in SHAPES and SHAPES[n].group != "memory"}
            if not found:
                continue
            groups: list[Callable[[AttentionCase], bool]] = [
                lambda case: case.group == "large",
                lambda case: case.group == "tiny",
                lambda case: case.length >= 1024,
            ]
            means = [mean([x for n, x in found.items() if chosen(SHAPES[n])]) for chosen in groups]
            worst = min(found, key=lambda n: found[n])
            cells = [_times(m) for m in means]
            table.add_row(impl, other, *cells, f"{_times(found[worst])} at {worst}")
    return "times as fast, geometric means", table


def memory(rows: Sequence[Row]) -> tuple[str, Any]:
    """What the memory case needs beside q, k, v, the output and their gradients.

    Temporaries are the compiler's count, in which memory that a kernel takes itself is missing;
    growth is that of resident memory during a call less the results.
    """
    found = [row for row in rows if row["case"] in SHAPES and row["pass"] == "forward+backward"]
    found = [row for row in found if SHAPES[row["case"]].group == "memory" and row["ms"]]
    table = _table(["impl", "temporaries\nMiB", "of\nthese", "growth\nMiB", "of\nthese"])
    what = ""
    for row in found:
        size = 2 if row["dtype"] == "bfloat16" else 4
        operands = SHAPES[row["case"]].operand_bytes(size) / 2**20
        what = f"memory at {row['case']}; q, k, v, out and their gradients: {operands:.0f} MiB"
        grown = None if row["peak_mib"] is None else max(0.0, row["peak_mib"] - operands / 2)
        cells = []
        for mib in (row["temporary_mib"], grown):
            cells += ["-", "-"] if mib is None else [f"{mib:.1f}", f"{mib / operands:.2f}"]
        table.add_row(row["impl"], *cells)
    return what, table


def notes(rows: Sequence[Row]) -> list[str]:
    """Lines below the tables: the product rate, agreement, comparisons, and what did not run."""
    lines = []
    peaks = [row["peak_gflops"] for row in rows if row["peak_gflops"]]
    if peaks:
        middle = sorted(peaks)[len(peaks) // 2]
        lines.append(
            f"float32 product, among the repetitions: {middle:.0f} GFLOP/s"
            f" ({min(peaks):.0f} to {max(peaks):.0f} over the cases)"
        )
    errors = [row["error"] for row in rows if row["error"] is not None]
    if errors:
        names = {"attention": "outputs and gradients", "eval": "log-likelihoods"}
        what = names.get(rows[0]["bench"], "first losses")
        lines.append(f"checked: all {what} agree within {max(errors):.0e} of the largest entry")
    lines += _comparisons(rows)
    ran = [row for row in rows if row["ms"]]
    noisy = sum(row["ms"]["max"] > 2 * row["ms"]["min"] for row in ran)
    if noisy:
        lines.append(
            f"not quiet: in {noisy} of {len(ran)} rows the slowest repetition took more than twice"
            " the fastest; repeat it on an idle machine before quoting it"
        )
    cases = len({row["case"] for row in rows})
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"]:
            reasons.setdefault((row["impl"], row["reason"]), []).append(row["case"])
    for (impl, reason), where in reasons.items():
        at = "" if len(where) == cases else f" at {', '.join(where)}"
        lines.append(f"{impl}{at}: {reason}")
    return lines


def _comparisons(rows: Sequence[Row]) -> list[str]:
    """One line per case of `step` and `population`: our best against the baseline."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows if row["bench"] != "attention"):
        here = _of_case(rows, case)
        other = baseline(here)
        best = fastest(
            [r for r in here if r["impl"] not in BASELINES and not r["impl"].startswith("torch_")]
        )
        if best and other:
            ratio = _times(_median(other) / _median(best))
            lines.append(f"{case}: {best['impl']} is {ratio} as fast as {other['impl']}")
    return lines


def _cells(row: Row, other: Row | None) -> list[str]:
    if not row["ms"]:
        return ["-"] * 6
    ms = row["ms"]
    rate = row["gflops"]
    if row["bench"] == "step":
        rate = row["tokens_per_s"]
    elif row["bench"] in ("population", "eval"):
        rate = row["replicas"] * 1e3 / ms["median"]
    return [
        _digits(ms["median"]),
        f"{_digits(ms['min'])} - {_digits(ms['max'])}",
        _digits(rate),
        "-" if row["fraction_of_peak"] is None else f"{row['fraction_of_peak']:.2f}",
        "-" if other is None else _times(_median(other) / ms["median"]),
        "-" if row["peak_mib"] is None else f"{row['peak_mib']:,.1f}",
    ]


def _digits(value: float) -> str:
    """Three digits that count: 0.123, 12.3, 123, 12,345."""
    places = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(places, 4)}f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _median(row: Row) -> float:
    return row["ms"]["median"]


def _of_case(rows: Sequence[Row], case: str) -> list[Row]:
    return [row for row in rows if row["case"] == case]


def _table(columns: Sequence[str]) -> Any:
    """Names to the left, numbers to the right."""
    from rich import box
    from rich.table import Column, Table

    words = ("B x N x T x H", "model", "impl", "against", "worst")
    heads = [
        Column(name, justify="left" if name in words else "right", no_wrap=True) for name in columns
    ]
    return Table(*heads, box=box.SIMPLE, padding=(0, 1, 0, 0))
