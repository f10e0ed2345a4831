"""Published curves: every number within its tolerance, where the data are at hand.

The data belong to their authors. They are looked for in the folder ONSET_PUBLISHED, or beside the
checkout; without them the tests of the numbers are skipped.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lm.config import UserError
from lm.emergence import published
from lm.emergence.published import chinchilla, curves, files, numbers, obsscaling

BESIDE = Path(__file__).parents[2] / ".." / "shared" / "data" / "published"
FOLDER = Path(os.environ.get("ONSET_PUBLISHED", BESIDE))
needs_data = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="no published data; put their folder into ONSET_PUBLISHED"
)
# How many numbers of each name stand in the table of docs/scaling.md.
COUNTS = {"chinchilla": 52, "gadre": 11, "pythia": 32, "obsscaling": 14, "gpt3": 20,
          "wei2022": 6, "ushape": 9}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    """Each name analysed once; Chinchilla with 1000 resamples."""
    made = {}

    def get(name):
        if name not in made:
            folder = str(FOLDER)
            made[name] = (
                chinchilla.analyse(folder, resamples=1000)
                if name == "chinchilla"
                else published.analyse(name, folder)
            )
        return made[name]

    return get


@needs_data
@pytest.mark.parametrize("name", published.NAMES)
def test_every_number_is_reproduced(name, results):
    """Catches any change of a fit, a statistic or a reader that moves a published number."""
    result = results(name)
    wrong = [n for n in result.numbers if not n.ok]
    assert not wrong
    assert len(result.numbers) == COUNTS[name]
    assert len({n.what for n in result.numbers}) == COUNTS[name]


@needs_data
def test_the_verb_prints_and_draws(tmp_path, capsys):
    """Catches an exit code that forgets a wrong number, a wide table, and a large figure."""
    out = tmp_path / "new"
    assert published.main(["wei2022", f"--data={FOLDER}", f"--out={out}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["name"] == "wei2022"
    assert set(said["numbers"][0]) == {"what", "ours", "published", "tolerance", "ok"}
    assert said["numbers"][1]["ours"] == said["numbers"][1]["published"] == 42
    assert said["numbers"][1]["ok"] is True
    figure = (out / "wei2022.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) <= 200_000
    with pytest.raises(UserError, match="is a file"):
        published.main(["wei2022", f"--data={FOLDER}", f"--out={out / 'wei2022.png'}"])


@needs_data
def test_tables_fit_the_page(results, capsys):
    """Catches a line longer than 100 columns, which a terminal folds."""
    published._show("chinchilla", results("chinchilla"), Path("chinchilla.png"))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "52 of 52 numbers agree" in shown


@needs_data
def test_a_number_that_does_not_agree_is_told(monkeypatch, tmp_path, capsys):
    """Catches a table that calls everything right: with one threshold moved, the verb fails."""
    from lm.emergence.published import wei2022

    monkeypatch.setattr(wei2022, "REST", ("other", 28))
    assert published.main(["wei2022", f"--data={FOLDER}", f"--out={tmp_path}"]) == 1
    assert "5 of 6 numbers agree" in capsys.readouterr().out


def test_names_are_listed_without_data(capsys):
    """Catches --list that reads files, and a file of which nobody says where it comes from."""
    assert published.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*published.NAMES, *files.SOURCES))
    assert max(map(len, shown.splitlines())) <= 100
    with pytest.raises(UserError, match="did you mean 'pythia'"):
        published.analyse("pythias")
    with pytest.raises(SystemExit):
        published.main(["--help"])
    shown = capsys.readouterr().out
    assert "lm published" in shown
    assert "example" in shown


def test_files_that_cannot_be_trusted(tmp_path):
    """Catches a wrong file that is read as if it were right; each is one sentence."""
    name, columns = "wei2022_bigbench_categories.csv", ("task", "category")
    with pytest.raises(UserError, match="does not exist; type the task lists"):
        files.read(name, columns, str(tmp_path))
    with pytest.raises(UserError, match="is no folder"):
        files.read(name, columns, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot be fetched"):
        files.read(name, columns, None)
    (tmp_path / name).write_text("task,kind\na,b\n")
    with pytest.raises(UserError, match="no column 'category'"):
        files.read(name, columns, str(tmp_path))
    (tmp_path / name).write_text("task,category\na,b\n")
    with pytest.raises(UserError, match="has 1 rows, not 197"):
        files.read(name, columns, str(tmp_path))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="is no table"):
        files.read(name, columns, str(tmp_path))
    (tmp_path / "chinchilla_epoch_svg.csv").write_text("loss\n1\n")
    with pytest.raises(UserError, match="has SHA-256"):
        files.read("chinchilla_epoch_svg.csv", ("loss",), str(tmp_path))


def test_what_is_fetched_is_pinned(monkeypatch, tmp_path):
    """Catches a branch in place of a commit, a hash that is not asked for, and a bare traceback."""
    import pooch

    asked = {}

    def retrieve(url, known_hash, fname, path):
        asked.update(url=url, known_hash=known_hash)
        raise ValueError("SHA256 hash of downloaded file does not match\nmore")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    for name, source in files.SOURCES.items():
        assert bool(source.url) == bool(source.sha256) != bool(source.made)
        if source.url:
            with pytest.raises(UserError, match="could not be fetched") as error:
                files.read(name, (), None)
            assert "\n" not in str(error.value)
            assert asked == {"url": source.url, "known_hash": f"sha256:{source.sha256}"}
            assert any(len(part) == 40 for part in source.url.split("/"))


def test_tolerances():
    """Catches an edge on the wrong side, and NaN that passes."""
    nan = float("nan")
    assert numbers.within("x", 1.01, 1.0, 0.011).ok
    assert not numbers.within("x", 1.02, 1.0, 0.011).ok
    assert numbers.share("x", -101, -100, 1).ok
    assert not numbers.share("x", 98.9, 100, 1).ok
    assert numbers.at_least("x", 2, 2).ok
    assert not numbers.at_least("x", 1.9, 2).ok
    assert numbers.at_most("x", 2, 2).ok
    made = [f("x", nan, 1.0, 1) for f in (numbers.within, numbers.share)]
    made += [f("x", nan, 1.0) for f in (numbers.at_least, numbers.at_most, numbers.exact)]
    assert not any(n.ok for n in made)
    assert published.to_json("x", numbers.Result(made, {}))["numbers"][0]["ours"] is None
    shown = [numbers.show(v) for v in (240, 0.347313, 2143.42, 0.00101827, 1.22e-16, nan)]
    assert shown == ["240", "0.34731", "2143.4", "0.00101827", "1.22e-16", "nan"]


@pytest.mark.parametrize("name", ["line", "power", "hinge", "logistic"])
def test_the_planted_curve_has_the_lowest_aicc(name):
    """Catches a curve that is fitted from a bad start, or AICc that forgets its parameters."""
    x = np.linspace(8, 11.2, 14)
    truth = {
        "line": 0.2 * (x - 8),
        "power": 10 ** (1.2 * (x - 11.3)),
        "hinge": 0.4 * np.maximum(x - 9.6, 0),
        "logistic": 0.8 / (1 + np.exp(-6 * (x - 9.7))),
    }[name]
    found = curves.fit(x, truth + np.random.default_rng(0).normal(0, 0.01, 14))
    assert next(iter(found)) == name
    assert found[name].at(x) == pytest.approx(truth, abs=0.03)


def test_one_component_is_found_behind_missing_scores():
    """Catches an imputation that leaves the mean in: the missing entries are then far off."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(40, 1)) * np.linspace(0.5, 1.5, 6) + rng.normal(0, 0.01, (40, 6))
    holes = table.copy()
    holes[rng.random(table.shape) < 0.15] = np.nan
    filled = obsscaling.impute(holes)
    assert filled == pytest.approx(table, abs=0.1)
    scores, share = obsscaling.components(filled)
    assert share[0] > 0.99
    assert share.sum() == pytest.approx(1)
    assert scores.shape == (40, 6)
