"""What a solver in the tests may see of an example."""

from collections.abc import Iterator

from lm.tasks.task import Example


def contexts(example: Example) -> Iterator[tuple[str, str]]:
    """(all text before an answer, the answer) of every turn."""
    text = ""
    for prompt, answer in ((example.prompt, example.answer), *example.more):
        text += prompt
        yield text, answer
        text += answer
