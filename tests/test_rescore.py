"""Metrics from stored answers, without the model."""

import numpy as np
import pytest

from lm.config import UserError
from lm.emergence import metrics, table
from lm.emergence.rescore import rescore


def test_stored_answers_give_the_rows_that_were_written(finished):
    """Catches a metric that depends on more than what is stored, and rows of another replica."""
    keys = [*table.IDENTITY]
    again = rescore(finished, last=False).set_index(keys).sort_index()
    written = table.load(finished).set_index(keys).sort_index()
    assert set(again.index) < set(written.index)
    written = written.loc[again.index]
    columns = ["value", "stderr", "n", "chance", "params"]
    for name in columns:
        np.testing.assert_array_equal(again[name], written[name], name)
    assert set(again.reset_index()["format"]) == {0, 1}


def test_a_new_metric_needs_no_model(finished):
    """Catches a metric of one's own that is lost, or measured at every step instead of the last."""

    def first_token(answers):
        hits = answers.greedy[:, 0] == answers.target[:, 0]
        return {"first_token": metrics.ratio(hits.astype(float), np.ones(len(hits)))}

    found = rescore(finished, first_token)
    assert set(found["metric"]) == {"first_token"} and set(found["step"]) == {30}
    assert found["value"].between(0, 1).all() and found["chance"].isna().all()


def test_a_study_without_answers_is_refused(tmp_path):
    """Catches an empty frame that fails somewhere else."""
    with pytest.raises(UserError, match="no stored answers; give the workdir"):
        rescore(tmp_path)
