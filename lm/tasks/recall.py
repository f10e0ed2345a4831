"""In-context recall (associative recall, induction): edges of a random cycle are shown shuffled,
then nodes are asked for.

`CA,FG,AF,GE,EC?A` asks what follows A. The nodes are a random 5-cycle over ten letters, so nothing
can be stored in the weights: only a model that looks the query up in its context answers. Guessing
among the four other nodes gives 1/4. It needs two layers of attention (Olsson et al. 2022,
"In-context Learning and Induction Heads").

Commas keep the two places of a node apart: without them the token after an A is its successor in
one edge and the next edge's node in the other, which relative positions cannot tell. Fewer edges
are easier to learn and make more edges learnable: see experiments/LOG.md.
"""

import numpy as np

from lm.tasks.task import Example, Task

ALPHABET = "ABCDEFGHIJ"


def recall(edges: int = 5) -> Task:
    """Recall over cycles of `edges` nodes; the key is the set of nodes.

    A key that knew the order of the cycle would leave its reverse and its siblings in the training
    split: small models remember those and answer *below* chance on the cycle that was held out.
    """

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        cycles = np.argsort(rng.random((n, len(ALPHABET))), axis=1)[:, :edges]
        shown = np.argsort(rng.random((n, edges)), axis=1)
        # With replacement, so that nothing follows by elimination.
        asked = rng.integers(0, edges, (n, turns))
        return [_example(c, s, q) for c, s, q in zip(cycles, shown, asked, strict=True)]

    # Ten turns less one for each edge fill a row of 32 tokens.
    return Task("recall", str(edges), generate, turns=10 - edges, held_out=0.15)


def _example(cycle: np.ndarray, shown: np.ndarray, asked: np.ndarray) -> Example:
    nodes = [ALPHABET[i] for i in cycle]
    follows = dict(zip(nodes, nodes[1:] + nodes[:1], strict=True))
    edges = ",".join(nodes[i] + follows[nodes[i]] for i in shown)
    queries = [nodes[i] for i in asked]
    return Example(
        prompt=f"{edges}?{queries[0]}",
        answer=follows[queries[0]],
        choices=tuple(node for node in nodes if node != queries[0]),
        key="recall:" + "".join(sorted(nodes)),
        more=tuple(("," + query, follows[query]) for query in queries[1:]),
    )
