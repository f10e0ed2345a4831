"""The notebooks: each runs from first cell to last on tiny settings, and is stored clean."""

import ast
import importlib.util
import os
import shutil
from pathlib import Path

import nbformat
import pytest
import tiny

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = (
    *("01_first_model", "02_emergence", "03_published_curves"),
    *("04_design_a_study", "05_metrics_and_mirages"),
)
BESIDE = FOLDER / ".." / ".." / "shared" / "data" / "published"
PUBLISHED = Path(os.environ.get("ONSET_PUBLISHED", BESIDE)).resolve()
OPENS_A_RUN = ("02_emergence", "05_metrics_and_mirages")


def read(name):
    """A notebook as it is stored, checked against the schema."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def code(notebook):
    """The sources of its code cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook, folder, **more):
    """Runs it in `folder` by a kernel of this interpreter; a cell that fails raises."""
    import nbclient
    from ipykernel.kernelspec import write_kernel_spec

    # A kernelspec of our own: there may be none, or one of another interpreter.
    write_kernel_spec(folder / "jupyter" / "kernels" / "python3")
    own = {"JUPYTER_PATH": folder / "jupyter", "IPYTHONDIR": folder / "ipython"}
    own |= {"JUPYTER_RUNTIME_DIR": folder / "runtime", "ONSET_RUNS": folder / "runs"}
    environment = tiny.environment(ONSET_SCALE="tiny", **{k: str(v) for k, v in own.items()})
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, path in own.items():
            patch.setenv(name, str(path))
        client.execute(env=environment | more)


def printed(notebook):
    """All that its cells printed or showed, as text."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def test_all_notebooks_are_listed():
    """Catches a notebook that no test runs."""
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stored_clean(name):
    """Catches stored outputs, which make a diff unreadable, a notebook that grows beyond what is
    read in one sitting, and one whose text is outnumbered by its code.
    """
    notebook = read(name)
    assert len(notebook.cells) <= 20
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None and not cell.outputs
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 40_000
    texts = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(texts) >= len(code(notebook)) - 2


@pytest.mark.parametrize("name", NAMES)
def test_imports_resolve(name):
    """Catches a renamed module or function in a notebook that is skipped for want of its data."""
    for node in ast.walk(ast.parse("\n".join(code(read(name))))):
        if isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(inside), inside


@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path, request):
    """Catches a cell that fails: an API that has changed, or a study too small for a statistic."""
    more = {}
    if name in OPENS_A_RUN:  # a copy, since it may write a report
        more["ONSET_RUN"] = str(tmp_path / "run")
        finished = request.getfixturevalue("finished")
        shutil.copytree(finished, more["ONSET_RUN"], ignore=shutil.ignore_patterns("checkpoints"))
    if name == "03_published_curves":
        if not PUBLISHED.is_dir():
            pytest.skip("no published data; put their folder into ONSET_PUBLISHED")
        more["ONSET_PUBLISHED"] = str(PUBLISHED)
    notebook = read(name)
    execute(notebook, tmp_path, **more)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert SAYS[name] in printed(notebook)
    assert not [p.name for p in tmp_path.iterdir() if p.name not in WRITES]


# Something that only the last steps of a notebook can know.
SAYS = {
    "01_first_model": "def __init__(self, ",
    "02_emergence": "AICc",
    "03_published_curves": "32 of 32 numbers agree",
    "04_design_a_study": "did you mean 'tokens'?",
    "05_metrics_and_mirages": "mirage  metric-induced",
}
# Nothing else may appear beside a notebook.
WRITES = ("jupyter", "ipython", "runtime", "runs", "run")


def test_a_failing_cell_is_told(tmp_path):
    """Catches an `execute` that goes on after an error: then no other test here could fail."""
    import nbclient

    cells = [nbformat.v4.new_code_cell(source) for source in ("x = 1", "1 / (x - 1)")]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        execute(nbformat.v4.new_notebook(cells=cells), tmp_path)
