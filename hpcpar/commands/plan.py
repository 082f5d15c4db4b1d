"""The command that foretells: time, memory, money and the best layout, with no rank started."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hpcpar.commands.command import Command, Words
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import UserError


def commands() -> list[Command]:
    """List this module's commands."""
    return [Command("plan", "foretell memory, time, days and money of a job, or search its best layout", _plan, [
        ("job", {"nargs": "?", "help": "a job file (TOML)"}),
        ("--json", {"action": "store_true", "help": "one object on stdout; seconds, bytes, FLOP"}),
        ("--plot", {"type": Path, "metavar": "DIR", "help": "draw timeline, memory and time into DIR"}),
        ("--search", {"action": "store_true", "help": "find the best layouts for the job's GPUs"}),
        ("--gpus", {"type": int, "metavar": "N", "help": "GPUs (default: those of [machine])"}),
        ("--with", {"dest": "second", "metavar": "KIND:N", "help": "share the batch with N GPUs of another kind"}),
        ("--budget", {"type": float, "metavar": "P", "help": "find the best model shapes of P parameters"}),
        ("--budget-days", {"type": float, "metavar": "D", "help": "find the largest model that trains in D days"}),
        ("--tokens-per-param", {"type": float, "default": 20.0, "metavar": "T", "help": "with --budget-days (20)"}),
        ("--mtbf-hours", {"type": float, "metavar": "H", "help": "between failures of the whole job (by its GPUs)"}),
        ("--restart-min", {"type": float, "default": 15.0, "metavar": "M", "help": "from failure to next step (15)"}),
        ("--efficiency", {"type": float, "metavar": "E", "help": "also the days at this share of the peak"}),
        ("--ladder", {"metavar": "NAME", "help": "a published family of models: gpt3"}),
        ("--params", {"type": float, "metavar": "P", "help": "without a job: bytes of P parameters"}),
        ("--tokens", {"type": float, "metavar": "T", "help": "with --params: FLOPs, GPU-days and money"}),
        ("--gpu", {"default": "a100-80g", "metavar": "KIND", "help": "with --params and --ladder (a100-80g)"}),
        ("--price", {"type": float, "default": 0.0, "metavar": "X", "help": "with --params: of a GPU-hour"}),
    ], overrides=True)]


def _plan(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.planner.shapes import describe_ladder, describe_sums

    if args.ladder:
        print(describe_ladder(args.ladder, args.gpu))
    elif args.params:
        print(describe_sums(args.params, args.tokens, args.gpus, args.gpu, args.efficiency, args.price))
    elif args.job is None:
        raise UserError("plan", "needs a job file", "hpcpar plan JOB, or --params P, or --ladder gpt3")
    elif args.search or args.budget or args.budget_days:
        _search(args, words)
    else:
        _one(args, words)
    return 0


def _one(args: argparse.Namespace, words: Words) -> None:
    from hpcpar.config.load import load_job, override
    from hpcpar.config.resolve import resolve
    from hpcpar.planner.plan import make_plan

    job = load_job(args.job, words)
    if args.gpus:
        per_node = job.machine.gpus_per_node
        job = override(job, layout={"dp": None}, machine={"nodes": -(-args.gpus // per_node)})
        job = resolve(job, args.gpus, on_paper=True)
    else:
        job = resolve(job, on_paper=True)
    if args.second:
        from hpcpar.planner.unequal import describe_shared, share_out

        kind, _, number = args.second.partition(":")
        if not number.isdigit():
            raise UserError("--with", f"{args.second} is not KIND:N", "for example --with a100-40g:256")
        print(describe_shared(share_out(job, ((job.machine.gpu, job.world_size), (kind, int(number))))))
        return
    plan = make_plan(job, mtbf_s=args.mtbf_hours and args.mtbf_hours * 3600, restart_s=args.restart_min * 60)
    if args.json:
        print(json.dumps(plan.as_json()))
    else:
        from hpcpar.planner.report import describe_plan

        print(describe_plan(plan, args.efficiency))
    if args.plot:
        from hpcpar.planner.picture import draw_plan

        for path in draw_plan(plan, args.plot):
            print(path)


def _search(args: argparse.Namespace, words: Words) -> None:
    from hpcpar.config.load import load_job, override
    from hpcpar.config.resolve import resolve
    from hpcpar.planner import shapes
    from hpcpar.planner.search import describe_search, layout_of, search

    job = load_job(args.job, words)
    num_gpus = args.gpus or job.machine.nodes * job.machine.gpus_per_node
    # the wish's own layout is what is searched for: it need not be legal for this number of GPUs
    plain = {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "dp": 1, "chunks": 1, "schedule": "1f1b", "table": ()}
    job = resolve(override(job, layout=plain, train={"microbatch": 1}), on_paper=True)
    if args.budget:
        print(shapes.describe_frontier(shapes.frontier(job, num_gpus, args.budget), args.budget))
        return
    if args.budget_days:
        shape = shapes.largest_in(job, num_gpus, args.budget_days, args.tokens_per_param)
        print(shapes.describe_frontier([shape], shape.params))
        return
    found = search(job, num_gpus)
    if args.json:
        best = found.best[0].as_json()
        print(json.dumps(best | {"candidates": [p.as_json() | {"layout": layout_of(p)} for p in found.best]}))
    else:
        print(describe_search(found))
