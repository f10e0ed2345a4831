"""Models of ours: a replica of a trained cell, at its newest whole checkpoint."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from lm import models, rundir
from lm.config import UserError, build
from lm.data import tokenizer as ours
from lm.pretrained.loaded import Loaded
from lm.pretrained.tokenizer import from_ours
from lm.train import mixture
from lm.train.cell import Cell
from lm.train.checkpoint import read_manifest, sealed_steps


def load(text: str, dtype: str) -> Loaded:
    """The model of `WORKDIR/CELL` or `WORKDIR/CELL:REPLICA`; the first replica unless said."""
    raise UserError(f"{text} is not there")
