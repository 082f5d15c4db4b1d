import dataclasses

import pytest

from hpcpar.config.job import Job
from hpcpar.config.load import override
from hpcpar.config.ramp import samples_before
from hpcpar.errors import UserError
from hpcpar.submit.sweep import points, until


def test_a_sweep_is_the_product_of_its_values():
    found = points(Job(), ["optim.lr=1e-4,3e-4", "--optim.betas=[0.9, 0.95],[0.8,0.9]", "data.store=a/b"])
    assert [(p.job.optim.lr, p.job.optim.betas) for p in found] == [
        (1e-4, (0.9, 0.95)), (1e-4, (0.8, 0.9)), (3e-4, (0.9, 0.95)), (3e-4, (0.8, 0.9))]
    assert all(p.job.data.store == "a/b" and "/" not in p.name for p in found)
    assert len({p.name for p in found}) == 4 and points(Job(), []) == [("", Job())]


@pytest.mark.parametrize(("sweep", "said"), [
    ("optim.lr", "names no values"), ("optim.lr=", "names no values"), ("optim.lr=1,1", "twice"),
    ("optim.lrr=1,2", "did you mean optim.lr?"), ("layout.tp=0,1", "must be at least 1"),
    ("layout.tp=a,b", "whole number"),
])
def test_a_sweep_that_is_none(sweep, said):
    with pytest.raises(UserError, match=said):
        points(Job(), [sweep])


@pytest.mark.parametrize("ramp", [None, (32, 32, 4000), (64, 64, 129)])
@pytest.mark.parametrize("tokens", ["1K", "130K", "2.5M", "1B"])
def test_until_takes_the_fewest_steps_that_see_the_tokens(ramp, tokens):
    job = override(Job(), model={"seq": 100}, optim={"ramp": ramp})
    wanted = int(float(tokens[:-1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[tokens[-1]])
    steps = until(job, tokens).train.steps
    assert 100 * samples_before(job, steps) >= wanted > 100 * samples_before(job, steps - 1)


def test_until_does_not_bend_the_learning_rate():
    job = override(Job(), train={"steps": 1000})
    assert until(job, "300").train.steps == 300 and until(job, "300").optim.decay_steps == 1000
    assert until(override(job, optim={"decay_steps": 5}), "300").optim.decay_steps == 5
    with pytest.raises(UserError, match="neither steps nor tokens"):
        until(job, "1.5")
    assert dataclasses.replace(until(job, "1000"), optim=job.optim) == job
