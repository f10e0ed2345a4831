"""Abilities: fixed by their seed, split without leaks, solvable from their text, with an honest
chance."""

import collections
import math

import numpy as np
import pytest
from turns import contexts

from experiments import desk
from lm import tasks
from lm.config import UserError
from lm.tasks import controls
from lm.tasks.task import Task

ALL = [pytest.param(*key, id="/".join(key)) for key in tasks.TASKS]


def draw(name, level, n=20_000, seed=0, turns=1):
    """Examples of every split, as the generator gives them."""
    return tasks.task(name, level).generate(np.random.default_rng(seed), n, turns)


# Solvers that see the text only and share no code with the generators.


def solve_recall(text):
    edges = text.split("?")[0].split(",")
    return next(edge[1] for edge in edges if edge[0] == text[-1])


def solve_addition(text):
    a, b = text.removesuffix("=").split("+")
    return str(int(a) + int(b))


@pytest.mark.parametrize(("name", "level"), ALL)
def test_examples_are_a_function_of_their_seed(name, level):
    """Catches a generator with state of its own, and a seed or split that changes nothing."""
    task = tasks.task(name, level)
    first = tasks.examples(task, "train", 3, 200, task.turns)
    assert first == tasks.examples(tasks.task(name, level), "train", 3, 200, task.turns)
    assert first != tasks.examples(task, "train", 4, 200, task.turns)
    assert len(first) == 200
    assert tasks.items(task, "test", 3, 50) == tasks.items(task, "test", 3, 50)


@pytest.mark.parametrize(("name", "level"), ALL)
def test_no_key_is_in_two_splits(name, level):
    """Catches a split by example in place of key, and an assertion that lets a leak pass."""
    task = tasks.task(name, level)
    splits = ("train", "validation", "test")
    drawn = {s: tasks.examples(task, s, 0, 1000, task.turns) for s in splits}
    keys = {s: {e.key for e in drawn[s]} for s in splits}
    assert not keys["train"] & (keys["test"] | keys["validation"])
    assert not keys["test"] & keys["validation"]
    tasks.assert_disjoint(task, drawn["train"], drawn["test"])
    leak = drawn["train"][137]
    with pytest.raises(AssertionError, match=f"{name}/{level}: key .* in train and in test"):
        tasks.assert_disjoint(task, drawn["train"], [*drawn["test"], leak])


@pytest.mark.parametrize(("name", "level"), ALL)
def test_shares_of_the_splits_are_those_of_held_out(name, level):
    """Catches a test split of another size, and a validation split unlike it."""
    share = tasks.task(name, level).held_out
    keys = {e.key for e in draw(name, level)}
    counts = collections.Counter(tasks.split_of(key, share) for key in keys)
    error = math.sqrt(share * (1 - share) / len(keys))
    assert counts["test"] / len(keys) == pytest.approx(share, abs=3 * error)
    assert counts["validation"] / len(keys) == pytest.approx(share, abs=3 * error)
    assert sum(counts.values()) == len(keys) > 50


def one_to_one(pairs):
    """Whether each left has one right, and the other way round."""
    pairs = set(pairs)
    return len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


@pytest.mark.parametrize("level", ["1", "2"])
def test_addition_has_one_key_for_both_orders(level):
    """Catches ordered keys: 25+47 in training would answer 47+25 in the test."""
    found = draw("addition", level)
    terms = [tuple(sorted(map(int, e.prompt.rstrip("=").split("+")))) for e in found]
    assert one_to_one((e.key, t) for e, t in zip(found, terms, strict=True))
    assert len({e.prompt for e in found}) > 1.5 * len(set(terms))


@pytest.mark.parametrize("level", ["3", "5"])
def test_recall_has_one_key_for_a_set_of_nodes(level):
    """Catches keys that know the order of the cycle, of the edges, or the query."""
    found = draw("recall", level)
    nodes = [frozenset(e.prompt[: 3 * int(level) - 1].replace(",", "")) for e in found]
    assert one_to_one((e.key, n) for e, n in zip(found, nodes, strict=True))
    assert len(set(nodes)) == math.comb(10, int(level))
    by_key = collections.defaultdict(set)
    for e in found:
        by_key[e.key].add(tuple(sorted(e.prompt.split("?")[0].split(","))))
    cycles = math.factorial(int(level) - 1)  # both directions are among them
    assert max(map(len, by_key.values())) == cycles


@pytest.mark.parametrize("level", ["3", "5"])
def test_recall_is_answered_from_its_text(level):
    """Catches edges that are not one cycle, wrong answers in any turn, and wrong choices."""
    task = tasks.task("recall", level)
    for example in tasks.examples(task, "train", 1, 300, task.turns):
        edges = dict(example.prompt.split("?")[0].split(","))
        node, path = next(iter(edges)), []
        for _ in edges:
            path.append(node)
            node = edges[node]
        assert node == path[0] and sorted(path) == sorted(edges) and len(edges) == int(level)
        assert set(example.choices) == set(edges) - {example.prompt[-1]}
        solved = [solve_recall(text) == answer for text, answer in contexts(example)]
        assert len(solved) == task.turns and all(solved)


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_addition_is_answered_from_its_text(digits):
    """Catches wrong sums, and answers whose length gives something away."""
    found = tasks.examples(tasks.task("addition", str(digits)), "train", 1, 300)
    for example in found:
        assert int(solve_addition(example.prompt)) == int(example.answer)
        assert len(example.answer) == digits + 1 and not example.more
    assert any(e.answer.startswith("0") for e in found)


def test_random_labels_are_one_fixed_table_balanced_in_each_split():
    """Catches labels that differ from draw to draw, or lean to one label in the test split."""
    table = {e.prompt: e.answer for e in draw("random_labels", "4", 60_000)}
    other = draw("random_labels", "4", seed=1)
    assert len(table) == controls.KEYS
    assert all(table[e.prompt] == e.answer for e in other)
    for split in ("train", "validation", "test"):
        found = tasks.examples(tasks.task("random_labels", "4"), split, 0, 40_000)
        counts = collections.Counter({e.prompt: e.answer for e in found}.values())
        assert set(counts) == set("WXYZ")
        assert max(counts.values()) - min(counts.values()) <= 1


def test_bigram_follows_its_chain():
    """Catches transitions from the wrong row, and a stationary start that is not."""
    found = tasks.examples(tasks.task("bigram", "1"), "train", 0, 3000, turns=28)
    texts = [e.prompt + e.answer + "".join(a for _, a in e.more) for e in found]
    assert {len(t) for t in texts} == {29} and all(p == "" for e in found for p, _ in e.more)
    codes = np.array([[controls.STATES.index(c) for c in t] for t in texts])
    counts = np.zeros((10, 10))
    np.add.at(counts, (codes[:, :-1].ravel(), codes[:, 1:].ravel()), 1)
    seen = counts.sum(1, keepdims=True)
    matrix = controls.transitions()
    error = np.sqrt(matrix * (1 - matrix) / seen) + 1e-4
    assert (np.abs(counts / seen - matrix) < 5 * error).all()
    first = np.bincount(codes[:, 0], minlength=10) / len(codes)
    np.testing.assert_allclose(first, controls.stationary(matrix), atol=0.03)


def test_entropy_rate_is_the_mean_surprise_of_a_long_chain():
    """Catches a wrong formula: the floor under the bigram's loss would be a wrong line."""
    matrix, rng, state = controls.transitions(), np.random.default_rng(0), 0
    nats = []
    for _ in range(40_000):
        following = rng.choice(10, p=matrix[state])
        nats.append(-math.log(matrix[state, following]))
        state = following
    error = np.std(nats) / math.sqrt(len(nats))
    assert np.mean(nats) == pytest.approx(controls.entropy_rate(matrix), abs=4 * error)
    assert controls.entropy_rate(np.full((4, 4), 0.25)) == pytest.approx(math.log(4))


def test_items_have_distinct_prompts_and_stop_when_there_are_no_more():
    """Catches repeated items, which would make every interval too narrow."""
    many = tasks.items(tasks.task("recall", "5"), "test", 0, 500)
    assert len({e.prompt for e in many}) == len(many) == 500
    few = [e.prompt for e in tasks.items(tasks.task("addition", "1"), "test", 0, 1000)]
    share = tasks.task("addition", "1").held_out
    pairs = [(a, b) for a in range(10) for b in range(10)]
    split = {p: tasks.split_of(f"addition:{min(p)}+{max(p)}", share) for p in pairs}
    assert sorted(few) == sorted(f"{a}+{b}=" for (a, b), s in split.items() if s == "test")
    assert 10 < len(few) < 60


def test_examples_run_out_with_a_sentence():
    """Catches an endless loop where a split is empty."""
    task = Task(
        *("one", "1", lambda rng, n, turns: [tasks.Example("a", "b", (), "k")] * n, "control")
    )
    empty = "test" if tasks.split_of("k") == "train" else "train"
    with pytest.raises(UserError, match=f"one/1 gave 0 of 5 {empty} .* raise its held_out"):
        tasks.examples(task, empty, 0, 5)


def test_weights_are_on_the_tokens_of_answers():
    """Catches weights on prompts: the loss would reward what cannot be known."""
    example = tasks.Example("ab?", "xy", (), "k", (("", "z"), (",c", "w")))
    ids, weights = tasks.tokens(example, lambda s: np.array([ord(c) for c in s]))
    assert "".join(map(chr, ids)) == "ab?xyz,cw"
    assert weights.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1]


def test_every_example_of_the_desk_mixture_fits_a_row():
    """Catches an example of 34 tokens with <bos> and <eos>: preparing the data would fail."""
    config = desk.get_config()
    for source in config.data.mixture.values():
        if source.task != "text":
            task = tasks.task(source.task, source.level)
            found = tasks.examples(task, "train", 0, 2000, task.turns)
            longest = max(len(tasks.tokens(e, lambda s: np.zeros(len(s)))[0]) for e in found)
            assert longest + 2 <= config.data.length + 1, f"{source.task}/{source.level}"
            text = {c for e in found for t, a in contexts(e) for c in t + a}
            assert text <= set(tasks.ALPHABET)


def test_unknown_task_is_a_sentence_with_the_known_ones():
    """Catches a KeyError in place of the list of what there is."""
    with pytest.raises(UserError, match="task recall/7 is not known; .*recall/3, recall/5"):
        tasks.task("recall", "7")


@pytest.mark.parametrize(("level", "value"), [("3", 1 / 2), ("5", 1 / 4)])
def test_chance_of_recall_is_a_guess_among_the_other_nodes(level, value):
    """Catches a chance of 1/10 that forgets the choices, or 1/5 that forgets the query."""
    found = tasks.chance(tasks.task("recall", level), n=2000)
    assert found.value == found.baselines["choices"] == value
    assert found.baselines["uniform"] == pytest.approx(0.1)


def test_chance_of_random_labels_is_a_quarter():
    """Catches a rule that is scored on the keys it was fitted on, which it remembers."""
    found = tasks.chance(tasks.task("random_labels", "4"))
    error = math.sqrt(0.25 * 0.75 / 1024)  # of a fixed rule on the 1,024 test keys
    assert found.baselines["uniform"] == found.baselines["choices"] == 0.25
    assert found.baselines["majority"] == pytest.approx(0.25, abs=4 * math.sqrt(0.19 / 8000))
    assert 0.25 <= found.value < 0.25 + 3 * error


@pytest.mark.parametrize(("digits", "sums"), [(1, 19), (2, 199), (3, 1999)])
def test_chance_of_addition_is_that_of_the_commonest_sum(digits, sums):
    """Catches a chance that counts answers the format cannot have, or that knows the terms.

    The commonest sum, 9.. and ..9, has a share of 10^-digits, and no digit of the prompt helps: if
    the first is known, 9 10^(digits-1) sums are as likely. Held-out pairs are few, so shares vary.
    """
    found = tasks.chance(tasks.task("addition", str(digits)), n=8000)
    share = 10.0**-digits
    pairs = 0.5 * tasks.task("addition", str(digits)).held_out * 10 ** (2 * digits)
    assert found.baselines["uniform"] == pytest.approx(1 / sums, rel=0.3)
    assert found.value < share + 4 * math.sqrt(share / pairs)
    assert found.baselines["choices"] == 0


def test_chance_of_the_bigram_is_its_commonest_state():
    """Catches the last character of the prompt taken for format: it is the true cause."""
    found = tasks.chance(tasks.task("bigram", "1"))
    commonest = controls.stationary(controls.transitions()).max()
    assert found.value == found.baselines["majority"] == pytest.approx(commonest, abs=0.02)
    assert not any("character" in name for name in found.baselines)


def planted(share, place=0, rare=False):
    """Ten answers; the character at `place` of the prompt names the answer in `share` of them.

    `rare`: the prompt begins with one of 5,000 characters, which can be remembered and say nothing.
    """

    def generate(rng, n, turns):
        found = []
        for answer, told, noise in zip(
            rng.integers(0, 10, n),
            rng.random(n) < share,
            rng.integers(0, 5000, (n, 9)),
            strict=True,
        ):
            letters = ["abcdefghij"[i % 10] for i in noise]
            if rare:
                letters[0] = chr(0x4E00 + noise[0])
            if told:
                letters[place] = "abcdefghij"[answer]
            prompt = "".join(letters)
            found.append(tasks.Example(prompt, str(answer), (), prompt))
        return found

    return Task("planted", "1", generate, "control")


def test_chance_does_not_choose_what_only_remembers():
    """Catches guessers chosen on what they were fitted on: the rule that remembers 5,000 characters
    would win there, fail in the test, and hide the shortcut."""
    assert tasks.chance(planted(0.4, 4, rare=True), n=3000).value > 0.4


@pytest.mark.parametrize("place", [0, 4, -2])
def test_chance_finds_a_planted_shortcut(place):
    """Catches a chance that misses what one character of the prompt gives away."""
    found = tasks.chance(planted(0.6, place), n=3000)
    assert found.value == pytest.approx(0.6 + 0.4 / 10, abs=0.03)
    name = max(found.baselines, key=lambda name: found.baselines[name])
    assert name in (f"character {place}", f"character {place % 9}", f"character {place - 9}")


def test_chance_of_noise_stays_uniform():
    """Catches guessers scored on what they were fitted on: with 24 of them and few examples the
    best looks like .15."""
    values = [tasks.chance(planted(0.0), n=600, seed=10 * s).value for s in range(6)]
    assert np.mean(values) == pytest.approx(0.1, abs=0.02)


def test_the_catalogue_shows_every_task_once(lm):
    """Catches a task that the list forgets, or an example that is not a test item."""
    found = lm("tasks", "--json").json["tasks"]
    assert sorted((e["task"], e["level"]) for e in found) == sorted(tasks.TASKS)
    (entry,) = [e for e in found if (e["task"], e["level"]) == ("recall", "3")]
    assert entry["ability"] == "in-context" and solve_recall(entry["prompt"]) == entry["answer"]
    assert "did you mean 'hop'" in lm("tasks", "hopp").refusal


def test_the_catalogue_describes_a_task_in_every_format(lm):
    """Catches a format or a level that is left out, and a chance of another task."""
    found = lm("tasks", "random_labels", "--json").json["tasks"]
    assert [e["format"] for e in found] == list(range(tasks.FORMATS))
    assert len({e["prompt"] for e in found}) == tasks.FORMATS
    assert all(e["chance"] == pytest.approx(0.25, abs=0.02) for e in found)
