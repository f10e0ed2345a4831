"""BLEU, chrF, ROUGE and exact match against the libraries that define them, and their intervals."""

import gzip
import json
import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lm.cli import main
from lm.config import UserError
from lm.eval import text

WORDS = [*"abcdefgh", "the", "cats,", "ran", "quickly", "houses", "jumping", "over", "dogs."]


def corpus(n: int, right: float, seed: int = 0, longest: int = 12) -> tuple[list[str], list[str]]:
    """Hypotheses with a share of right words, and references; some hypotheses are empty."""
    rng = random.Random(seed)
    refs = [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]
    hyps = [
        " ".join(w if rng.random() < right else rng.choice(WORDS) for w in ref.split())
        for ref in refs
    ]
    return ["" if rng.random() < 0.02 else hyp for hyp in hyps], refs


@pytest.mark.parametrize("right", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("longest", [3, 12])  # with 3 words there are no 4-grams
def test_bleu_and_chrf_are_those_of_sacrebleu(right, longest):
    hyps, refs = corpus(60, right, longest=longest)
    found = text.statistics(hyps, refs, ("bleu", "chrf"))
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(hyps, [refs]).score, rel=1e-9)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(hyps, [refs]).score, rel=1e-9)


def test_smoothing_without_matches_of_an_order():
    """One word of three is right, so three orders have no match and each is smoothed anew."""
    hyps, refs = ["a x y z w"], ["a b c d e"]
    found = text.statistics(hyps, refs, ("bleu",))["bleu"].value
    assert found == pytest.approx(sacrebleu.corpus_bleu(hyps, [refs]).score, rel=1e-9)
    assert 0 < found < 20


def test_a_draw_is_the_metric_of_the_drawn_segments():
    hyps, refs = corpus(40, 0.7)
    found = text.statistics(hyps, refs)
    drawn = np.random.default_rng(7).integers(40, size=(3, 40))[2]
    again = [hyps[i] for i in drawn], [refs[i] for i in drawn]
    for name, direct in (
        ("bleu", sacrebleu.corpus_bleu(again[0], [again[1]]).score),
        ("chrf", sacrebleu.corpus_chrf(again[0], [again[1]]).score),
        ("rougeL", text.statistics(*again, ("rougeL",))["rougeL"].value),
    ):
        draws = found[name].score(text.resample(found[name].parts, 3, seed=7))
        assert draws[2] == pytest.approx(direct, rel=1e-9)


def test_rouge_is_that_of_rouge_score():
    hyps, refs = corpus(50, 0.6)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    direct = [scorer.score(r, h) for h, r in zip(hyps, refs, strict=True)]
    for name, found in text.statistics(hyps, refs, ("rouge1", "rouge2", "rougeL")).items():
        assert found.value == pytest.approx(100 * np.mean([s[name].fmeasure for s in direct]))


def test_chinese_is_cut_into_characters():
    """By spaces every Chinese sentence is one word, and all but equal ones would score nothing."""
    hyps, refs = ["我们今天去学校吧", "你好"], ["我们明天去学校吧", "你好"]
    found = text.statistics(hyps, refs, ("bleu", "rouge1"), lang="zh_CN")
    assert "tok:zh" in found["bleu"].signature and found["bleu"].value > 50
    direct = sacrebleu.corpus_bleu(hyps, [refs], tokenize="zh").score
    assert found["bleu"].value == pytest.approx(direct, rel=1e-9)
    assert found["rouge1"].value == pytest.approx(100 * np.mean([7 / 8, 1]))
    with pytest.raises(UserError, match="lang zh or ja"):
        text.statistics(hyps, refs, ("bleu",))
    assert text.statistics(hyps, refs, ("chrf",))


def test_umlauts_are_letters_in_german():
    hyps, refs = ["für Mäuse"], ["für Läuse"]
    assert text.statistics(hyps, refs, ("rouge1",), "de")["rouge1"].value == pytest.approx(50)


def test_signatures_say_how():
    hyps, refs = corpus(5, 0.5)
    found = {name: s.signature for name, s in text.statistics(hyps, refs, lang="de").items()}
    metric = sacrebleu.metrics.BLEU()
    metric.corpus_score(hyps, [refs])
    assert found["bleu"] == f"BLEU|{metric.get_signature().format()}"
    assert found["chrf"].startswith("chrF2|nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert "stem:no" in found["rougeL"]


@pytest.mark.parametrize("metric", ["bleu", "chrf", "exact"])
def test_intervals_cover_what_they_should(metric):
    """Planted: 150 segments of a population of 3,000, whose own score is the truth."""
    hyps, refs = corpus(3000, 0.9, longest=6)
    population = text.statistics(hyps, refs, (metric,))[metric]
    rng, covered = np.random.default_rng(0), []
    for seed in range(300):
        some = text.Statistics(population.parts[rng.integers(3000, size=150)], population.score, "")
        low, high = text.compare({metric: some}, resamples=300, seed=seed)[0].score.ci
        covered.append(low <= population.value <= high)
    assert 0.9 <= np.mean(covered) <= 0.985


def test_a_planted_difference_is_found_and_none_is_not():
    worse, refs = corpus(200, 0.6, seed=1)
    better, _ = corpus(200, 0.8, seed=1)
    ours, other = (text.statistics(h, refs, ("bleu", "exact")) for h in (better, worse))
    for result in text.compare(ours, other):
        assert result.against.difference.ci.low > 0 and result.against.p < 0.01
        assert (
            result.against.other.ci
            == text.compare(other)[0 if result.metric == "bleu" else 1].score.ci
        )
    same = text.compare(ours, ours)[0].against
    assert same.difference.value == 0 and same.difference.ci == (0, 0) and same.p == 1


def test_p_is_uniform_where_there_is_no_difference():
    rng, ps = np.random.default_rng(3), []
    for seed in range(200):
        scores = [text.Statistics(text._with_ones(rng.random(80)), text.mean, "") for _ in "ab"]
        result = text.compare({"exact": scores[0]}, {"exact": scores[1]}, 200, seed)[0]
        ps.append(result.against.p)
    assert 0.01 <= np.mean(np.array(ps) <= 0.05) <= 0.1


def write(path, lines, packed=False):
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    return str(path)


def test_the_command_prints_scores_and_signatures(tmp_path, capsys):
    hyps, refs = corpus(30, 0.7)
    hyp, ref = write(tmp_path / "hyp.txt", hyps), write(tmp_path / "ref.txt.gz", refs, packed=True)
    other = write(
        tmp_path / "o.jsonl", [json.dumps({"text": h, "n": 1}) for h in corpus(30, 0.2)[0]]
    )
    assert main(["score", hyp, ref, f"--against={other}", "--metrics=bleu,exact"]) == 0
    shown = capsys.readouterr().out
    assert "30 segments" in shown and "BLEU|nrefs:1" in shown and "difference" in shown
    assert main(["score", hyp, ref, f"--against={other}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["metric"] for s in found["scores"]] == list(text.METRICS)
    direct = sacrebleu.corpus_bleu(hyps, [refs]).score
    assert found["scores"][0]["value"] == pytest.approx(direct)
    assert found["scores"][0]["difference"]["low"] > 0


def test_only_a_line_feed_ends_a_line(tmp_path, capsys):
    ref = tmp_path / "ref"
    ref.write_bytes("one\u2028two\u0085three\r\nfour\n".encode())
    assert main(["score", str(ref), str(ref), "--metrics=exact", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["segments"] == 2


MISTAKES = {
    "counts": (b"a\nb\n", b"a\n", [], "2 segments and .* has 1"),
    "nothing": (b"\n\n", b"a\nb\n", [], "no text"),
    "empty": (b"", b"a\n", [], "no text"),
    "latin1": (b"a\nM\xe4use\n", b"a\nb\n", [], r"not UTF-8 \(line 2"),
    "gzip": (gzip.compress(b"a\nb\n")[:-9], b"a\nb\n", [], "damaged gzip"),
    "gap": (b"a\nb\n", b"a\n\n", [], "reference 2 is empty"),
    "metric": (b"a\n", b"a\n", ["--metrics=blue"], "did you mean 'bleu'"),
    "lang": (b"a\n", b"a\n", ["--lang=German"], "code such as"),
    "twice": (None, None, [], "- is given twice"),
    "absent": (b"a\n", b"a\n", ["--against=nowhere"], "nowhere does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, tmp_path, capsys):
    *contents, more, sentence = MISTAKES[mistake]
    files = []
    for name, content in zip(("hyp", "ref"), contents, strict=True):
        files.append("-" if content is None else str(tmp_path / name))
        if content is not None:
            (tmp_path / name).write_bytes(content)
    assert main(["score", *files, *more]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(err)


def test_bad_json_lines(tmp_path):
    for line in ("nonsense", "3", '{"texts": "a"}', "[" * 100_000):
        path = write(tmp_path / "hyp.jsonl", [json.dumps("fine"), line])
        with pytest.raises(UserError, match="line 2"):
            text.read_segments(path)


def test_too_long_for_rouge_l_is_said():
    long = "word " * 5000
    with pytest.raises(UserError, match="hypothesis 2 .*too many for ROUGE-L"):
        text.statistics(["a", long], ["a", "b"], ("rougeL",))
    assert text.statistics(["a", long], ["a", "b"], ("rouge1", "bleu", "chrf"))
