"""A user's own table: read, checked, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcpar.config.load import job_from_tables
from hpcpar.config.resolve import resolve
from hpcpar.errors import UserError
from hpcpar.layout.layout import Layout
from hpcpar.layout.schedule import make_schedule


def layout(table: Any, batch: int = 4, **wish: Any) -> Layout:
    return Layout(resolve(job_from_tables({
        "model": {"layers": 8}, "layout": {"pp": 2, "chunks": 2, "schedule": "table", "table": table, **wish},
        "train": {"global_batch": batch},
    })))


def lines_of(name: str, m: int) -> list[str]:
    return [",".join(map(str, order)) for order in make_schedule(name, 2, m, 2).orders]


@pytest.mark.parametrize("name", ["interleaved", "zbv"])
def test_a_table_is_the_schedule_it_spells(name: str, tmp_path: Path) -> None:
    made = layout(lines_of(name, 4))
    assert made.schedule(4) == make_schedule(name, 2, 4, 2)
    assert made.chunk_ranks == ((0, 1, 1, 0) if name == "zbv" else (0, 1, 0, 1))
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(lines_of(name, 4)) + "\n")
    assert layout(str(file)).job == made.job  # the job keeps the lines: the file may go


@pytest.mark.parametrize(("change", "said"), [
    (lambda lines: [lines[0].replace("0F0", "0G0"), lines[1]],
     'layout.table: line 1: "0G0" is not chunk, F B I or W, microbatch; write for example "0F0 0F1 0B0 0B1"'),
    (lambda lines: [lines[0].replace("0F0,", ""), lines[1]], "layout.table: cannot be played: 0F0 is missing"),
    (lambda lines: [lines[0], ",".join(reversed(lines[1].split(",")))], "layout.table: cannot be played: schedule"),
    (lambda lines: lines[:1], "layout.table: cannot be played: chunk 1 is on no rank"),
    (lambda lines: [lines[0], lines[1], ""], "layout.table: has 3 ranks and 4 chunks, not pp = 2"),
])
def test_what_cannot_be_played_is_refused(change: Any, said: str) -> None:
    with pytest.raises(UserError) as found:
        layout(change(lines_of("interleaved", 4)))
    assert str(found.value).startswith(said)


def test_a_table_is_of_one_number_of_microbatches() -> None:
    with pytest.raises(UserError, match="has 4 microbatches, the job 6"):
        layout(lines_of("interleaved", 4), batch=6)
    with pytest.raises(UserError, match="a table does not"):
        resolve(job_from_tables({
            "model": {"layers": 8}, "train": {"global_batch": 4}, "optim": {"ramp": [2, 2, 9]},
            "layout": {"pp": 2, "chunks": 2, "schedule": "table", "table": lines_of("zbv", 4)}}))
