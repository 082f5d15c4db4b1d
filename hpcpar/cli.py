"""The door: one function a command; only here is the environment read."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpcpar.config.load import describe_options, load_job, override, to_toml
from hpcpar.config.resolve import resolve
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import HpcparError, UserError

Words = list[str]  # overrides such as --layout.tp 4
GO_ON = 75  # stopped cleanly and wants to go on


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 the input is wrong, 3 the run failed, 75 wants to go on."""
    surroundings = Surroundings.read(os.environ)
    try:
        rest, words = _split(sys.argv[1:] if argv is None else argv)
        args = _parser().parse_args(rest)
        if words and not args.overrides:
            raise UserError(words[0], "is not an option of this command", f"see hpcpar {args.command} --help")
        command: Callable[[argparse.Namespace, Words, Surroundings], int] = args.function
        return command(args, words, surroundings)
    except HpcparError as error:
        if surroundings.rank == 0:
            print(f"hpcpar: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # a launcher that ends the others at the first exit would swallow rank 0's line
        return error.exit_code


def _split(argv: Sequence[str]) -> tuple[Words, Words]:
    """Part a command line into what argparse knows and the overrides (a dotted flag and its value)."""
    rest: Words = []
    words: Words = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            rest.append(word)
            continue
        words.append(word)
        if "=" not in word and waiting and not waiting[0].startswith("--"):
            words.append(waiting.pop(0))
    return rest, words


class _Command(NamedTuple):
    name: str
    help: str
    function: Callable[[argparse.Namespace, Words, Surroundings], int]
    overrides: bool  # whether it takes --table.key value
    arguments: Sequence[tuple[str, dict[str, Any]]]


def _commands() -> list[_Command]:
    job = ("job", {"help": "a job file (TOML)"})
    run = ("--run", {"type": Path, "metavar": "DIR", "help": "run folder (default: runs/NAME OF THE JOB)"})
    return [
        _Command("train", "train a job, alone or under mpirun/srun; goes on from the last set", _train, True, [
            job, run, ("--allow-fresh", {"action": "store_true", "help": "start anew in a folder without a valid set"}),
        ]),
        _Command("show", "print a job's layout, or a run's state, without starting ranks", _show, True, [
            ("job", {"help": "a job file or a run folder"}),
            ("--schedule", {"action": "store_true", "help": "draw the pipeline's schedule"}),
            ("--plot", {"action": "store_true", "help": "draw loss.png and timeline.png (run folder)"}),
        ]),
        _Command("generate", "print text from a run's newest checkpoint", _generate, False, [
            ("run", {"type": Path, "help": "a run folder"}),
            ("--prompt", {"default": "", "help": "text to continue"}),
            ("--tokens", {"type": int, "default": 100, "help": "tokens to add at most (100)"}),
            ("--temperature", {"type": float, "default": 0.8, "help": "0 takes the likeliest (0.8)"}),
            ("--seed", {"type": int, "default": 1, "help": "of the sampling (1)"}),
        ]),
        _Command("parity", "compare a job on its layout with one process, in fp64 (or --train.precision fp32)", _parity,
                 True, [job, ("--steps", {"type": int, "default": 20, "help": "steps to compare (20)"})]),
        _Command("submit", "make a Slurm job of it (or run it here through submitit's local executor)", _submit, True, [
            job, run, ("--dry-run", {"action": "store_true", "help": "print the script, submit nothing"}),
            ("--executor", {"choices": ("slurm", "local", "debug"), "default": "slurm", "help": "who runs it"}),
        ]),
        _Command("options", "list every option of a job file", _options, False, []),
    ]


def _parser() -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise UserError("command line", message, f"see {self.prog} --help")

    parser = Parser(prog="hpcpar", allow_abbrev=False, epilog="any option of the job file can be given as "
                    "--table.key value; exit codes: 0 done, 2 wrong input, 3 failed, 75 stopped and wants to go on")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, text, function, overrides, arguments in _commands():
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for flag, settings in arguments:
            made.add_argument(flag, **settings)
        made.set_defaults(function=function, overrides=overrides)
    data = commands.add_parser("data", help="build a token store, or show one").add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser)
    build = data.add_parser("build", help="text, gzip or JSONL files and folders -> a token store", allow_abbrev=False)
    build.add_argument("paths", nargs="+", metavar="PATH")
    build.add_argument("--out", required=True, type=Path, metavar="STORE", help="the store's folder")
    words = build.add_mutually_exclusive_group()
    words.add_argument("--vocab", type=int, help="train a tokenizer of this size (32768)")
    words.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this tokenizer.json")
    build.add_argument("--workers", type=int, help="processes (all cores)")
    build.add_argument("--limit-mib", type=int, help="read at most this much of the text")
    build.set_defaults(function=_data_build, overrides=False)
    show = data.add_parser("show", help="counts, vocabulary, fingerprint, first words", allow_abbrev=False)
    show.add_argument("store", type=Path)
    show.set_defaults(function=_data_show, overrides=False)
    return parser


def _run_folder(args: argparse.Namespace) -> RunFolder:
    return RunFolder(args.run or Path("runs") / Path(args.job).stem)


def _train(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    job = resolve(load_job(args.job, words), surroundings.num_tasks)
    folder = _run_folder(args)

    from hpcpar.train.preflight import check_run_folder, open_order, put_aside

    order = open_order(job)
    check_run_folder(folder, args.allow_fresh)

    from hpcpar.comm.bootstrap import connect, open_process_group
    from hpcpar.comm.watch import Watch
    from hpcpar.layout.layout import Layout
    from hpcpar.train.loop import start_run, train

    world = connect(surroundings)
    if args.allow_fresh and world.rank == 0:
        put_aside(folder)
    world.control.barrier()
    folder.create()
    logging.basicConfig(filename=folder.log(world.rank), level=logging.INFO, force=True,
                        format="%(asctime)s %(levelname)s %(message)s")
    with Watch.start(folder, world.control, world.host, Layout(job).mesh, world.abort) as watch:
        watch.note(phase="start")
        open_process_group(world)
        run = start_run(job, world, folder, order, surroundings.live, lambda action: watch.note(action=action))
        logging.info("bootstrap: %s", ", ".join(f"{k} {v:.3f} s" for k, v in world.seconds.items()))
        done = train(run, watch.note)
    return 0 if done else GO_ON


def _show(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.layout.describe import describe
    from hpcpar.layout.layout import Layout
    from hpcpar.layout.schedule import draw

    path = Path(args.job)
    folder = RunFolder(path) if path.is_dir() else None
    job = resolve(load_job(folder.config if folder else path, words))
    layout = Layout(job)
    if args.plot:
        if folder is None:
            raise UserError("--plot", f"{path} is not a run folder", "give the folder of a run")
        from hpcpar.train.picture import draw_run

        for picture in draw_run(folder, job):
            print(picture)
        return 0
    print(to_toml(job))
    print(describe(layout))
    if args.schedule:
        num = job.train.global_batch // (layout.mesh.dp_size * job.train.microbatch)
        print(f"\n{draw(job.layout.schedule, layout.mesh.pp_size, num)}")
    return 0


def _generate(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.verify import latest_set
    from hpcpar.data.store import TokenStore
    from hpcpar.train.generate import generate, load_network, saved_job

    path = latest_set(RunFolder(args.run).checkpoints)
    if path is None:
        raise UserError(str(args.run), "has no published checkpoint", "train first: hpcpar train JOB --run DIR")
    job = saved_job(path)
    store = job.data.store if isinstance(job.data.store, str) else job.data.store[0][0]
    tokenizer = TokenStore.open(store).tokenizer()
    network = load_network(path, job)
    print(generate(network, tokenizer, args.prompt, args.tokens, args.temperature, args.seed))
    return 0


def _parity(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    job = resolve(load_job(args.job, words), surroundings.num_tasks)
    if job.train.precision not in ("fp64", "fp32"):
        job = override(job, train={"precision": "fp64"})

    from hpcpar.train.preflight import open_order

    order = open_order(job)

    from hpcpar.comm.bootstrap import connect, open_process_group
    from hpcpar.train.parity import compare

    world = connect(surroundings)
    tolerance = {"fp64": 1e-10, "fp32": 1e-5}[job.train.precision]
    try:
        open_process_group(world)
        found = compare(job, world, order.tokens, args.steps, tolerance)
    except BaseException:
        traceback.print_exc()
        world.abort(3)  # the others wait in a collective, and MPI's own end would wait for them
        raise
    if world.rank == 0:
        print(f"{args.steps} steps of {job.world_size} ranks against one process, {job.train.precision}: largest "
              f"differences: loss {found.loss:.1e}, gradient norm {found.grad_norm:.1e}"
              + (f", gradients {found.grads:.1e}, weights {found.weights:.1e}"
                 if job.train.precision == "fp64" else ""))
        print(f"FIRST DIFFERENCE: {found.first}" if found.first else f"equal within {tolerance:g}")
    return 3 if found.first else 0


def _submit(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.submit.slurm import submit

    folder = _run_folder(args)
    submission = submit(Path(args.job), words, folder.path, os.environ, executor=args.executor, dry_run=args.dry_run)
    print(submission)
    return 0


def _data_build(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.data.build import build

    limit = args.limit_mib * 2**20 if args.limit_mib else None
    build(args.paths, args.out, vocab=args.vocab, tokenizer=args.tokenizer, workers=args.workers, limit_bytes=limit)
    return 0


def _data_show(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.data.store import describe

    print(describe(args.store))
    return 0


def _options(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    print(describe_options())
    return 0


if __name__ == "__main__":
    sys.exit(main())
