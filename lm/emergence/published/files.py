"""The files of the published curves: where they come from, and how they are trusted.

Nothing of them is part of this project. A file is read from the folder that the user names, or
fetched from the authors' repository at a pinned commit, into a cache, if they keep it there as it
is. Either way its SHA-256 must be the one below. Four were made by us: two gather hundreds of
JSON files of their authors, and two hold numbers printed in a paper. They are read from the folder
only, and trusted by their columns and their number of rows.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lm.config import UserError

if TYPE_CHECKING:
    import pandas as pd


class Source(NamedTuple):
    """A file of a published curve: `url` and `sha256` of the raw file, or how it is `made`."""

    url: str
    sha256: str
    made: str
    rows: int


GITHUB = "https://raw.githubusercontent.com"
EPOCH = f"{GITHUB}/epoch-research/analyzing-chinchilla/92258837425e1b5f2851d624287f0120583a3d0e"
ROBUST = (
    f"{GITHUB}/RylanSchaeffer/KoyejoLab-Robustness-Chinchilla-Compute-Optimal-Scaling"
    "/ad412e61aa4c8e4247d4dbe6f9dab6380a2900bc"
)
OBSERVED = f"{GITHUB}/ryoungj/ObsScaling/4d6e1e43fd2635d04654aa77d1df9d5266ea0382/eval_results"
USHAPE = (
    f"{GITHUB}/tony10101105/ExpEmergence/288b731d68fbc0328de28d394af108da71a09d36/data/arithmetic"
)
DECILES = "arithmetic_instance_brier_-1000_63.09573444801933_10_redist.csv"

SOURCES = {
    "chinchilla_epoch_svg.csv": Source(
        f"{EPOCH}/data/svg_extracted_data.csv",
        "193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30",
        "",
        245,
    ),
    "chinchilla_model_parameters.csv": Source(
        f"{ROBUST}/data/chinchilla_model_parameters.csv",
        "77bfd71258eef9e27f87095cbd0821a7b0c487722c18fb108831d6b6c8cb8721",
        "",
        50,
    ),
    "obsscaling_base_llm_benchmark_eval.csv": Source(
        f"{OBSERVED}/base_llm_benchmark_eval.csv",
        "511996815735a4c46251dc585dcc525e370d148201f86561e6f927f9df2d0db8",
        "",
        148,
    ),
    "obsscaling_base_llm_emergent_capability_eval.csv": Source(
        f"{OBSERVED}/base_llm_emergent_capability_eval.csv",
        "a156beee73c39b7833c3c53535c473939105512d85e90b0143be7325e516ef7c",
        "",
        84,
    ),
    "ushape_arithmetic_instance_brier.csv": Source(
        f"{USHAPE}/{DECILES}",
        "a7e71aefafd9cb69e94e2524981acb68e18228947c19516e2ba1a22c851ce89b",
        "",
        114,
    ),
    "ushape_acc_arithmetic_instance.csv": Source(
        f"{USHAPE}/acc_{DECILES}",
        "b3cf99391c8397045ceef95213f47bdda13f7c3ff854c9865caa515006ae51f2",
        "",
        114,
    ),
    "gadre_overtraining.csv": Source(
        "",
        "",
        "gather exp_data/models and exp_data/evals of github.com/mlfoundations/scaling at a003c491",
        104,
    ),
    "pythia_v1_evals.csv": Source(
        "", "", "gather evals/pythia-v1 of github.com/EleutherAI/pythia at a19eecb8", 701
    ),
    "gpt3_tableH1_subset.csv": Source(
        "", "", "type 2D+ and symbol insertion from Table H.1 of arXiv 2005.14165", 48
    ),
    "wei2022_bigbench_categories.csv": Source(
        "", "", "type the task lists of Appendix E of arXiv 2206.07682", 197
    ),
}


def read(name: str, columns: tuple[str, ...], folder: str | None) -> "pd.DataFrame":
    """The table of the file `name` with at least these columns, from `folder` or fetched.

    Raises `UserError` for a file that is missing, cannot be fetched, has another SHA-256, lacks a
    column or has another number of rows.
    """
    import pandas as pd

    source = SOURCES[name]
    place = _place(name, source, folder)
    content = place.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if source.sha256 and digest != source.sha256:
        raise UserError(
            f"{place} has SHA-256 {digest[:12]}..., not {source.sha256[:12]}...; get it again from"
            f" {source.url}"
        )
    try:
        table = pd.read_csv(place)
    except ValueError as error:  # includes pandas' own parser errors
        raise UserError(f"{place} is no table ({error}); {_remedy(name, source)}") from error
    missing = [column for column in columns if column not in table]
    if missing:
        raise UserError(f"{place} has no column {missing[0]!r}; {_remedy(name, source)}")
    if len(table) != source.rows:
        raise UserError(
            f"{place} has {len(table)} rows, not {source.rows}; {_remedy(name, source)}"
        )
    return table


def _place(name: str, source: Source, folder: str | None) -> Path:
    """Where the file is; without a folder it is fetched, if its authors keep it as it is."""
    if folder is not None:
        place = Path(folder).expanduser() / name
        if not Path(folder).expanduser().is_dir():
            raise UserError(f"{folder} is no folder; --data takes the folder of the data files")
        if not place.is_file():
            raise UserError(f"{place} does not exist; {_remedy(name, source)}")
        return place
    if not source.url:
        raise UserError(f"{name} cannot be fetched; {_remedy(name, source)}")
    import pooch

    cache = pooch.os_cache("onset")
    try:
        got = pooch.retrieve(source.url, f"sha256:{source.sha256}", fname=name, path=cache)
    except (OSError, ValueError) as error:  # no network; another hash
        raise UserError(
            f"{source.url} could not be fetched ({str(error).splitlines()[0][:80]}); save it as"
            f" {name} in a folder and give --data=FOLDER"
        ) from error
    return Path(got)


def _remedy(name: str, source: Source) -> str:
    if source.url:
        return f"save {source.url} as {name} there"
    return f"{source.made} as {name} (docs/scaling.md has its columns) and give --data=FOLDER"
