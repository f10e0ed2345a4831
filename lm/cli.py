"""`lm VERB`: one line per verb; a verb's module is imported only when the verb is called.

Exit codes: 0 done, 1 something failed, 2 the user's mistake (one sentence on stderr), 130
interrupted.
"""

import errno
import importlib
import importlib.metadata
import os
import sys

from lm.config import UserError, nearest

# verb -> (module:function, what --help says); the function takes the arguments, and returns the
# exit code.
VERBS = {
    "run": ("experiments.runner:main", "carry out a study, or go on with one"),
    "plan": ("experiments.plan:main", "what a study would take on accelerators that are not here"),
    "status": ("experiments.inspect_run:status", "every cell of a run directory and how far it is"),
    "eval": ("experiments.harness:main", "measure new abilities on a study or any checkpoint"),
    "explain": ("experiments.inspect_run:explain", "everything behind one point of a study"),
    "verify": ("experiments.inspect_run:verify", "check every checksum of a run directory"),
    "report": ("lm.emergence.report:main", "analyse a run directory and write its page"),
    "predict": (
        "lm.emergence.predict:main",
        "freeze what larger sizes will do, and score it later",
    ),
    "published": ("lm.emergence.published:main", "recompute the numbers of published curves"),
    "tasks": ("lm.tasks.catalogue:main", "list the abilities, or everything about one"),
    "tokenizer": ("lm.data.tokenizer:main", "train a tokenizer, or show one"),
    "score": ("lm.eval.text:main", "BLEU, chrF and ROUGE of texts, with intervals"),
    "generate": ("lm.generate.cli:main", "go on with a text"),
    "chat": ("lm.generate.chat:main", "a conversation in the terminal"),
    "fill": ("lm.generate.fill:main", "what a masked model would put in place of [MASK]"),
    "code": ("experiments.code:main", "complete programming problems, and run them in a jail"),
    "serve": ("lm.serve.cli:main", "serve a model by OpenAI's protocol"),
    "weights": ("lm.pretrained.show:main", "what is in a model, and write it for transformers"),
    "translate": ("lm.translate:translate", "translate texts with a model that learned to"),
    "summarize": ("lm.translate:summarize", "summarize texts with a model that learned to"),
    "bench": ("lm.bench:main", "time attention, training steps or populations, beside PyTorch"),
}


# What the machine refuses and the user can mend: the sentence after the name of the file.
REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space, then give the same command again",
    errno.EDQUOT: "the quota is used up; free some space, then give the same command again",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission is denied; choose another place or change the permissions",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
    errno.ELOOP: "its symbolic links lead round in a circle; mend them, or choose another place",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"lm: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # `lm status DIR | head`: the interpreter flushes once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        print(f"lm: error: {error.filename}: {REMEDIES[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lm: interrupted", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"lm {importlib.metadata.version('onset-lm')}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise UserError(f"{verb!r} is not a verb; {nearest(verb, list(VERBS))} (lm --help)")
    module, function = VERBS[verb][0].split(":")
    code = getattr(importlib.import_module(module), function)(rest)
    return int(code or 0)


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "Trains language models of many sizes and seeds, and says where each ability begins.",
            "",
            "usage: lm VERB ...        lm VERB --help says more        lm --version",
            "",
            *lines,
            "",
            "example: lm run experiments/desk.py --workdir=runs/desk",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
