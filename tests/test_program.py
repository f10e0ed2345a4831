"""Programs: what they are shared by, what making them cost, and who makes which."""

import fcntl
import hashlib
import threading
from types import SimpleNamespace

import jax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from test_cell import cell as settings

from experiments import worker
from lm.config import build
from lm.data.loader import Batch
from lm.eval.suite import make_test_set
from lm.rundir import holder, lock, read_json, write_json
from lm.sharding import make_mesh
from lm.train import mixture, program
from lm.train.cell import TEXT, Cell
from lm.train.program import compile_cell, make_cell_population, scoring_rows


def text_hash(cell):
    """SHA-256 of what XLA is given to compile for fresh states and for training."""
    mesh = make_mesh(cell.train.strategy, jax.devices()[:1])
    population = make_cell_population(cell, mesh)
    states = population.states
    numbers = (
        jax.ShapeDtypeStruct(a.shape, t)
        for a, t in ((states.step, "uint32"), (states.step, "float32"), (states.step, "uint32"))
    )
    shape = (len(cell.replicas), cell.train.chunk, cell.data.rows, cell.data.length)
    batches = jax.tree.map(lambda a: jax.ShapeDtypeStruct(shape, a.dtype), scoring_rows(cell))
    with jax.set_mesh(mesh):
        texts = [population.init.lower(*numbers).as_text()]
        texts.append(population.run.lower(states, batches).as_text())
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def test_names_seeds_rates_and_data_are_no_part_of_a_program():
    """Breaks if one of them is baked in as a constant: every cell would be compiled anew."""
    alike = text_hash(settings())
    other = settings(
        name="other",
        optim__learning_rate=3e-3,
        seeds={"replicas": 2, "first": 7, "vary": ["init"], "eval": 3},
        data__mixture__recall__level="3",
        data__mixture__text__weight=0.25,
    )
    assert text_hash(other) == alike
    assert text_hash(settings(optim__weight_decay=0.7)) != alike


def test_the_scoring_batch_needs_no_data(finished):
    """Breaks if a cell is compiled for other rows than those it is evaluated on."""
    configs = read_json(finished / "study.json")["cell_configs"]
    cell = build(Cell, configs["1x4"], "1x4")
    prepared = mixture.load(cell, finished / "data")
    abilities = {k: v for k, v in prepared.test.items() if k[0] != TEXT}
    text = prepared.test[TEXT, "", 0]
    batches = make_test_set(abilities, text, cell.eval.text_rows, cell.eval.batch).batches
    for got, want in zip(scoring_rows(cell), Batch(*(a[0] for a in batches)), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


def test_what_compiling_took_is_in_the_events(finished):
    """Breaks if the seconds of a cell are lost, or those of `result.json` are not the waiting."""
    for name in tiny.CELLS:
        (event,) = tiny.events(finished / name, "compiled")
        assert event["programs"] == 3 and 0 <= event["cached"] <= 3
        assert all(event[kind] > 0 for kind in ("trace", "lower", "compile"))
        seconds = read_json(finished / name / "result.json")["seconds"]
        assert seconds["compile"] == pytest.approx(event["waited"], abs=1e-3)


def test_programs_from_the_cache_are_counted(tmp_path, monkeypatch):
    """Breaks if a hit is not told from a miss, or is counted for another thread's program."""
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        cell = settings(model__size="1x4", model__heads=1, model__kv_heads=1)
        costs = [compile_cell(cell, scoring_rows(cell), jax.devices()[:1]).cost]
        thread = threading.Thread(
            target=lambda: costs.append(
                compile_cell(cell, scoring_rows(cell), jax.devices()[:1]).cost
            )
        )
        thread.start()
        thread.join()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert [(c.programs, c.cached) for c in costs] == [(3, 0), (3, 3)]


def test_one_program_is_compiled_by_one_process_at_a_time(tmp_path, monkeypatch):
    """Breaks if two workers compile the same program, one of them in vain."""
    monkeypatch.setattr(
        program.jax, "config", SimpleNamespace(jax_compilation_cache_dir=str(tmp_path))
    )
    lowered, entered = SimpleNamespace(as_text=lambda: "module"), threading.Event()

    def enter():
        with program._one_process_at_a_time(lowered):
            entered.set()

    enter()
    (path,) = (tmp_path / "locks").iterdir()
    entered.clear()
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()
    monkeypatch.setattr(program.jax.config, "jax_compilation_cache_dir", "/dev/null")
    enter()  # no lock to be had: compiles all the same


@pytest.fixture
def workers(finished, tmp_path, monkeypatch):
    """Four cells that no one has begun, and a function that makes a worker's view of them."""
    config = read_json(finished / "study.json")["cell_configs"]["1x4"]
    cells = {name: config | {"name": name} for name in "abcd"}
    for name in cells:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(worker, "compile_cell", lambda cell, rows: f"program of {cell.name}")
    return (
        tmp_path,
        {n: build(Cell, c, n) for n, c in cells.items()},
        lambda: worker._Ahead(tmp_path, cells),
    )


def test_the_next_cell_is_compiled_while_one_trains(workers):
    """Breaks if a program goes to another cell, or a claim outlives its use."""
    folder, cells, view = workers
    one = view()
    order = one.order()
    for name, following in zip("abcd", [*"bcd", ""], strict=True):
        assert next(order) == name
        assert one.program(cells[name]) == f"program of {name}"
        claimed = [n for n in "abcd" if holder(folder / n / "ahead.lock")]
        assert claimed == list(following)
    assert next(order, None) is None


def test_two_workers_compile_different_cells(workers):
    """Breaks if both compile one cell, if one trains what the other holds ready while there is
    something else to do, or if a cell is left over.
    """
    folder, cells, view = workers
    one, two = view(), view()
    first, second = one.order(), two.order()
    with lock(folder / next(first) / "lock", "train a"):
        one.program(cells["a"])
        assert one.name == "b"
        assert next(second) == "a"  # held: the worker would go on
        for name, ahead in (("c", "d"), ("d", "")):
            assert next(second) == name
            two.program(cells[name])
            assert two.name == ahead
            write_json(folder / name / "result.json", {})
        assert next(second) == "b"  # one is still at work, and nothing else is left
        write_json(folder / "b" / "result.json", {})
    assert next(first, None) is None and next(second, None) is None


def test_a_failure_ahead_comes_when_its_turn_comes(workers, monkeypatch):
    """Breaks if a cell that cannot be compiled takes the one before it down, or is passed over."""
    _, cells, view = workers

    def compile_cell(cell, rows):
        if cell.name == "b":
            raise ValueError("no program")
        return f"program of {cell.name}"

    monkeypatch.setattr(worker, "compile_cell", compile_cell)
    one = view()
    order = one.order()
    assert one.program(cells[next(order)]) == "program of a"
    with pytest.raises(ValueError, match="no program"):
        one.program(cells[next(order)])
    assert one.program(cells[next(order)]) == "program of c"
