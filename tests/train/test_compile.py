"""train.compile: compiled layers compute what plain ones do; a missing compiler is said before any rank starts."""

from __future__ import annotations

import shutil

import pytest

from hpcpar.comm.bootstrap import connect
from hpcpar.config.load import override
from hpcpar.config.surroundings import Surroundings
from hpcpar.errors import UserError
from hpcpar.train.parity import compare
from hpcpar.train.preflight import check_compiler
from tests.parity.jobs import job_of, random_tokens

PLAIN = {"mesh": (1, 1, 1), "schedule": "1f1b", "sequence_parallel": True, "tied": True, "kind": "gpt", "vocab": 61,
         "spare_layers": 0, "kv_heads": 8, "clip": 0.05, "accumulation": 2, "recompute": "none", "dropout": 0.1,
         "zero": 1, "ramp": False}


def compiled_job():
    return override(job_of(PLAIN), model={"layers": 1}, train={"compile": True})


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on CPU needs a C++ compiler: no g++ here")
def test_compiled_layers_equal_one_plain_process():
    found = compare(compiled_job(), connect(Surroundings.read({})), random_tokens(61, 8), 3, 1e-10)
    assert found.first == "" and len(found.losses) == 3


def test_a_missing_compiler_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    check_compiler(job_of(PLAIN), gpus=False)
    with pytest.raises(UserError, match=r"train\.compile: needs a C\+\+ compiler"):
        check_compiler(compiled_job(), gpus=False)
