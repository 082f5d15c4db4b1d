"""Commands that start ranks, or look at what they left: train, parity, generate, show."""

from __future__ import annotations

import argparse
import logging
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hpcpar.commands.command import Command, Words, job_argument, run_argument, run_folder, whole, whole_job
from hpcpar.config.load import override, to_toml
from hpcpar.config.run_folder import RunFolder
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import HpcparError, RunError, UserError

if TYPE_CHECKING:
    from hpcpar.comm.bootstrap import World
    from hpcpar.config.job import Job
    from hpcpar.data.sampler import SampleOrder

GO_ON = 75  # stopped cleanly and wants to go on


def commands() -> list[Command]:
    """List this module's commands."""
    return [
        Command("train", "train a job, alone or under mpirun/srun; goes on from the last set", _train, [
            job_argument(), run_argument(),
            ("--allow-fresh", {"action": "store_true", "help": "start anew in a folder without a valid set"}),
            ("--rewind-to", {"type": int, "metavar": "STEP", "help": "go on from this older set; later ones are moved "
                                                                     "aside"}),
            ("--skip-samples", {"metavar": "A:B", "help": "never train on these sample numbers"}),
        ], overrides=True),
        Command("show", "print a job's layout, or a run's state, without starting ranks", _show, [
            ("job", {"help": "a job file or a run folder"}),
            ("--schedule", {"nargs": "?", "const": "own", "choices": ["own", "pipedream", "2bw"],
                            "help": "draw the pipeline's schedule, or one that exists on paper only"}),
            ("--plot", {"action": "store_true", "help": "draw loss.png and timeline.png (run folder)"}),
        ], overrides=True),
        Command("generate", "print text from a run's newest checkpoint", _generate, [
            ("run", {"type": Path, "help": "a run folder"}),
            ("prompt", {"nargs": "?", "default": "", "help": "text to continue"}),
            ("--tokens", {"type": whole, "default": 100, "help": "tokens to add at most (100)"}),
        ]),
        Command("parity", "compare a job on its layout with one process, in fp64 (or --train.precision fp32)",
                _parity, [
            job_argument(), ("steps", {"type": whole, "nargs": "?", "default": 20, "help": "steps to compare (20)"}),
        ], overrides=True),
    ]


def _train(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    job = whole_job(args.job, words, surroundings.num_tasks)
    folder = run_folder(args)

    from hpcpar.train.preflight import check_compiler, check_run_folder, check_space, open_order, put_aside

    order = open_order(job)
    check_run_folder(folder, args.allow_fresh)
    check_space(job, folder)
    check_compiler(job, surroundings.gpus)

    from hpcpar.comm.bootstrap import connect
    from hpcpar.train.claim import claimed
    from hpcpar.train.rewind import rewind

    world = connect(surroundings)
    with ExitStack() as until_the_end:
        def prepare() -> None:
            folder.create()
            until_the_end.enter_context(claimed(folder, world.host))
            if args.allow_fresh:
                put_aside(folder)
                folder.create()
            if args.rewind_to is not None or args.skip_samples:
                print(rewind(folder, args.rewind_to, args.skip_samples), flush=True)

        def begin() -> None:
            folder.create()  # again: asked so, NFS forgets that it knew of no such folder
            logging.raiseExceptions = False  # a full disk under the logs is no reason to fill stderr
            logging.basicConfig(filename=folder.log(world.rank), level=logging.INFO, force=True,
                                format="%(asctime)s %(levelname)s %(message)s")

        _agree(world, lambda: prepare() if world.rank == 0 else None)
        _agree(world, begin)
        return 0 if _watched(job, world, folder, order, surroundings) else GO_ON


def _watched(job: Job, world: World, folder: RunFolder, order: SampleOrder, surroundings: Surroundings) -> bool:
    """Train with witnesses beside the ranks; return whether the job is done."""
    from hpcpar.comm.bootstrap import close_process_group, open_process_group
    from hpcpar.comm.crowd import let_later_stages_first
    from hpcpar.comm.watch import Watch
    from hpcpar.layout.layout import Layout
    from hpcpar.train.loop import start_run, train
    from hpcpar.train.shortage import explained

    mesh = Layout(job).mesh
    orphaned = ["-m", "hpcpar.submit.heir", str(folder.path.absolute())]
    with (Watch.start(folder, world.control, world.host, mesh, world.abort, job.health,
                      orphaned if surroundings.launcher == "srun" else ()) as watch,
          explained(job, mesh.coordinates(world.rank), world.device)):
        watch.note(phase="start")
        open_process_group(world)
        run = start_run(job, world, folder, order, surroundings.live, lambda action: watch.note(action=action))
        run.waits = lambda: dict(watch.recorder.waits)
        if world.device.type == "cpu":
            let_later_stages_first(run.places, world.rank, run.trainee.layout.chunk_ranks,
                                   run.trainee.groups.at.pp_rank)
        logging.info("bootstrap: %s", ", ".join(f"{k} {v:.3f} s" for k, v in world.seconds.items()))
        done = train(run, watch.note)
        close_process_group()
    return done


def _agree(world: World, work: Callable[[], None]) -> None:
    """Have every rank do a part of the start; what any raises is raised on all, for the others would wait for it."""
    mistake: HpcparError | None = None
    try:
        work()
    except HpcparError as error:
        mistake = error
    except OSError as error:
        mistake = UserError(str(error.filename or "--run"), error.strerror or str(error),
                            "give a --run folder of yours")
    except Exception as error:
        traceback.print_exc()
        mistake = RunError(f"rank {world.rank}: {type(error).__name__}: {error}")
    for found in world.control.all_gather(mistake):
        if found is not None:
            raise found


def _show(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.layout.describe import describe
    from hpcpar.layout.layout import Layout
    from hpcpar.layout.schedule import draw, draw_stale

    path = Path(args.job)
    folder = RunFolder(path) if path.is_dir() else None
    job = whole_job(folder.config if folder else path, words)
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
    num = layout.num_microbatches
    if args.schedule == "own":
        print(f"\n{draw(layout.schedule(num))}")
    elif args.schedule:
        print(f"\n{draw_stale(args.schedule, layout.mesh.pp_size, num)}")
    return 0


def _generate(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    from hpcpar.checkpoint.exchange import load_network, saved_job
    from hpcpar.checkpoint.verify import latest_set
    from hpcpar.data.store import TokenStore
    from hpcpar.train.generate import generate

    path = latest_set(RunFolder(args.run).checkpoints)
    if path is None:
        raise UserError(str(args.run), "has no published checkpoint", "train first: hpcpar train JOB --run DIR")
    job = saved_job(path)
    store = job.data.store if isinstance(job.data.store, str) else job.data.store[0][0]
    tokenizer = TokenStore.open(store).tokenizer()
    network = load_network(path, job)
    print(generate(network, tokenizer, args.prompt, args.tokens))
    return 0


def _parity(args: argparse.Namespace, words: Words, surroundings: Surroundings) -> int:
    job = whole_job(args.job, words, surroundings.num_tasks)
    if job.train.precision not in ("fp64", "fp32") or not any(word.startswith("--train.precision") for word in words):
        job = override(job, train={"precision": "fp64"})

    from hpcpar.train.preflight import open_order

    order = open_order(job)

    from hpcpar.comm.bootstrap import close_process_group, connect, open_process_group
    from hpcpar.train.parity import compare

    world = connect(surroundings)
    tolerance = {"fp64": 1e-10, "fp32": 1e-5}[job.train.precision]
    try:
        open_process_group(world)
        found = compare(job, world, order.tokens, args.steps, tolerance)
        close_process_group()
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
