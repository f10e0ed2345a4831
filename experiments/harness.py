"""`lm eval CHECKPOINT --harness=TASKS`: tasks of EleutherAI's lm-evaluation-harness on any
checkpoint that `lm.pretrained` loads; without `--harness`, what `experiments.evaluate` does.

Tasks are lm-eval's own, or YAML files in the folder `--include_path`. Nothing is fetched unless
`--download` says so: most of lm-eval's tasks have their items on a hub, local ones have them in a
JSON file beside the YAML.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from lm.config import UserError, nearest, within

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
BOOTSTRAP = 1000  # draws, for the few metrics whose error has no formula


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `lm eval --harness --help` shows what there is")


def main(argv: Sequence[str]) -> int:
    """`lm eval`: dispatches on `--harness`."""
    if not any(word.partition("=")[0] == "--harness" for word in argv):
        from experiments import evaluate

        return evaluate.main(list(argv))
    args = _parse(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "lm-eval is not installed; install the extra: pip install 'onset-lm[harness]'"
        )
    if not args.download:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
    # lm-eval would fork a process that has threads, for its bootstrap.
    os.environ["DISABLE_MULTIPROC"] = "1"
    if not sys.stderr.isatty():
        os.environ.update({"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default it takes
    begin = time.monotonic()
    manager, names = _tasks(args.harness, args.include_path)
    from lm.eval.harness import OnsetLM

    model = OnsetLM(args.checkpoint, args.max_length)
    results = _evaluate(model, manager, names, args)
    rows = list(read(results))
    if args.json:
        about = {"checkpoint": args.checkpoint, "max_length": model.max_length}
        about |= {"truncated": model.truncated, "seconds": round(time.monotonic() - begin, 1)}
        print(json.dumps(about | {"results": rows}))
        return 0
    _show(rows)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        "lm eval",
        description="Evaluates a checkpoint on tasks of EleutherAI's lm-evaluation-harness.",
        epilog="example: lm eval model.gguf --harness=my_task --include_path=tasks --limit=100",
    )
    parser.add_argument(
        "checkpoint", help="a Hugging Face folder, a GGUF file, or WORKDIR/CELL[:REPLICA]"
    )
    parser.add_argument(
        "--harness", nargs="?", const="", required=True, metavar="TASKS", help="such as a,b"
    )
    parser.add_argument("--include_path", metavar="DIR", help="more tasks, as YAML files")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task at most")
    parser.add_argument("--shots", type=int, metavar="N", help="examples before each question")
    parser.add_argument("--max_length", type=int, metavar="N", help="tokens the model is given")
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    parser.add_argument("--download", action="store_true", help="fetch items from their hub")
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    args = parser.parse_args(argv)
    if args.limit is not None:
        within("--limit", args.limit, 1)
    if args.shots is not None:
        within("--shots", args.shots, 0)
    return args


def _tasks(text: str, include: str | None) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names asked for; raises UserError with the nearest name."""
    if include is not None and not Path(include).is_dir():
        raise UserError(f"--include_path {include} is not a folder; give one with YAML files")
    names = list(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))
    if not names:
        raise UserError(f"--harness is {text!r}; name a task, such as --harness=hellaswag")
    manager = _manager(include)
    for name in names:
        if not manager.match_tasks([name]):
            known = list(manager.all_tasks)
            raise UserError(f"lm-eval has no task {name!r}; {nearest(name, known)}")
    return manager, names


@cache
def _manager(include: str | None) -> Any:
    """It reads the thousands of YAML files of lm-eval: seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _evaluate(model: Any, manager: Any, names: Sequence[str], args: argparse.Namespace) -> Any:
    import lm_eval

    try:
        return lm_eval.simple_evaluate(
            model,
            tasks=list(names),
            num_fewshot=args.shots,
            limit=args.limit,
            task_manager=manager,
            apply_chat_template=args.chat,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP,
        )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        what = " ".join(str(error).split())[:200]
        fetch = "" if args.download else "; items that are not on this machine need --download"
        raise UserError(f"lm-eval cannot run {', '.join(names)}: {what}{fetch}") from error


def read(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One record for every metric of every task: task, metric, filter, value, stderr or None, n."""
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{filter}")
            yield {
                **{"task": task, "metric": metric, "filter": filter, "value": value},
                "stderr": error if isinstance(error, float) else None,
                "n": results.get("n-samples", {}).get(task, {}).get("effective"),
            }


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console

    from experiments.display import print_columns

    heads = ("task", "metric", "value", "± error", "items")
    cells = [
        (
            row["task"],
            row["metric"] + ("" if row["filter"] == "none" else f" ({row['filter']})"),
            f"{row['value']:.4f}" if abs(row["value"]) < 1e5 else f"{row['value']:.4g}",
            "" if row["stderr"] is None else f"{row['stderr']:.4f}",
            "" if row["n"] is None else str(row["n"]),
        )
        for row in rows
    ]
    print_columns(Console(), heads, cells, left=heads[:2])
