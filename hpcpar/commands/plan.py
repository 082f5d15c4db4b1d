"""The command that foretells: time, memory, money and the best layout, with no rank started."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path

from hpcpar.commands.command import Command, Words, positive, whole
from hpcpar.config.job import Job
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import UserError


def commands() -> list[Command]:
    """List this module's commands."""
    return [Command("plan", "foretell memory, time, days and money of a job, or search its best layout", _plan, [
        ("job", {"nargs": "?", "help": "a job file (TOML), or a number of parameters: the sums on it"}),
        ("--json", {"action": "store_true", "help": "one object on stdout; seconds, bytes, FLOP"}),
        ("--plot", {"type": Path, "metavar": "DIR", "help": "draw timeline, memory and time into DIR"}),
        ("--search", {"action": "store_true", "help": "find the best layouts for the job's GPUs"}),
        ("--gpus", {"type": whole, "metavar": "N", "help": "GPUs (default: those of [machine])"}),
        ("--with", {"dest": "second", "metavar": "KIND:N", "help": "share the batch with N GPUs of another kind"}),
        ("--budget", {"metavar": "P|Dd", "help": "find the best model shapes of P parameters, or the largest model "
                                                 "that trains in D days, as in 30d (20 tokens a parameter)"}),
        ("--efficiency", {"type": _share, "metavar": "E", "help": "also the days at this share of the peak"}),
        ("--ladder", {"metavar": "NAME", "help": "a published family of models: gpt3"}),
        ("--tokens", {"type": positive, "metavar": "T", "help": "with a number of parameters: FLOPs, GPU-days, "
                                                             "money"}),
    ], overrides=True)]


def _share(text: str) -> float:
    number = positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the peak, such as 0.4")
    return number


def _plan(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    num_parameters = _number(args.job)
    if args.tokens and num_parameters is None:
        raise UserError("--tokens", "goes with a number of parameters", "hpcpar plan 175e9 --tokens 300e9; a job's "
                        "tokens are train.steps x train.global_batch x model.seq")
    if args.job is not None and not args.ladder and num_parameters is None:
        (_search if args.search or args.budget else _one)(args, words)
    elif args.json or args.plot or args.search or args.budget or args.second:
        raise UserError("plan", "--json, --plot, --search, --budget and --with need a job file", "hpcpar plan JOB ...")
    elif args.ladder or num_parameters is not None:
        _sums(args, words, num_parameters)
    else:
        raise UserError("plan", "needs a job file", "hpcpar plan JOB, or hpcpar plan 175e9, or --ladder gpt3")
    return 0


def _number(word: str | None) -> float | None:
    try:
        return positive(word or "")
    except argparse.ArgumentTypeError:
        with suppress(ValueError):
            raise UserError("plan", f"{float(word or '')} is no number of parameters", "for example 175e9") from None
    return None


def _sums(args: argparse.Namespace, words: Words, num_parameters: float | None) -> None:
    from hpcpar.config.load import job_from_words, parse_overrides
    from hpcpar.planner.shapes import describe_ladder, describe_sums

    gpu, job = parse_overrides(words).get("machine.gpu", "a100-80g"), job_from_words(words)
    if args.ladder:
        print(describe_ladder(args.ladder, gpu))
    elif num_parameters is not None:
        print(describe_sums(num_parameters, args.tokens, args.gpus, gpu, args.efficiency,
                            job.submit.price_per_gpu_hour))


def _one(args: argparse.Namespace, words: Words) -> None:
    from hpcpar.config.load import load_job, override
    from hpcpar.config.resolve import resolve
    from hpcpar.planner.plan import make_plan
    from hpcpar.planner.recompute import choose_recompute

    job = load_job(args.job, words)
    if args.plot:
        _make_folder(args.plot)
    if args.gpus:
        per_node = job.machine.gpus_per_node
        job = override(job, layout={"dp": None}, machine={"nodes": -(-args.gpus // per_node)})
        job = resolve(job, args.gpus, on_paper=True)
    else:
        job = resolve(job, on_paper=True)
    job = choose_recompute(job)
    if args.second:
        from hpcpar.planner.unequal import describe_shared, share_out

        kind, _, number = args.second.partition(":")
        if not number.isdigit():
            raise UserError("--with", f"{args.second} is not KIND:N", "for example --with a100-40g:256")
        print(describe_shared(share_out(job, ((job.machine.gpu, job.world_size), (kind, int(number))))))
        return
    plan = make_plan(job)
    if args.json:
        print(json.dumps(plan.as_json()))
    else:
        from hpcpar.planner.report import describe_plan

        print(describe_plan(plan, args.efficiency))
    if args.plot:
        from hpcpar.planner.picture import draw_plan

        for path in draw_plan(plan, args.plot):
            print(path)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--plot", f"{path} cannot be a folder: {error.strerror}", "give a folder of yours") from None


def _search(args: argparse.Namespace, words: Words) -> None:
    from hpcpar.config.load import load_job, override
    from hpcpar.config.resolve import resolve
    from hpcpar.planner.search import describe_search, layout_of, search

    job = load_job(args.job, words)
    num_gpus = args.gpus or job.machine.nodes * job.machine.gpus_per_node
    # the wish's own layout is what is searched for: it need not be legal for this number of GPUs
    plain = {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "dp": 1, "chunks": 1, "schedule": "1f1b", "table": (),
             "zero": 1}
    job = resolve(override(job, layout=plain, train={"microbatch": 1}), on_paper=True)
    if args.budget:
        print(_budget(job, num_gpus, args.budget))
        return
    found = search(job, num_gpus)
    if args.json:
        best = found.best[0].as_json()
        print(json.dumps(best | {"candidates": [p.as_json() | {"layout": layout_of(p)} for p in found.best]}))
    else:
        print(describe_search(found))


def _budget(job: Job, num_gpus: int, budget: str) -> str:
    from hpcpar.planner.shapes import describe_frontier, frontier, largest_in

    try:
        amount = positive(budget.removesuffix("d"))
    except argparse.ArgumentTypeError:
        raise UserError("--budget", f"{budget} is neither a number nor days", "for example 245e9, or 30d") from None
    if budget.endswith("d"):
        shape = largest_in(job, num_gpus, amount)
        return describe_frontier([shape], shape.params)
    return describe_frontier(frontier(job, num_gpus, amount), amount)
