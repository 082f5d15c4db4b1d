"""Random numbers as a function of (key, element): their moments, and that no layout shows in them."""

from __future__ import annotations

import random

import pytest
import torch

from hpcpar.layout.boxes import Box, whole
from hpcpar.layout.parameters import Parameter
from hpcpar.nn import counter
from hpcpar.nn.counter import keep_mask, make_key, mix, normal
from hpcpar.nn.dropout import draw_for, dropout
from hpcpar.nn.init import initial_values

MILLION = 1 << 20


@pytest.mark.parametrize("seed", [1, 2])
def test_normal_has_the_moments_of_a_normal(seed: int) -> None:
    x = normal(make_key(seed, "w"), torch.arange(MILLION), 1.0)
    assert abs(x.mean()) < 5 / MILLION**0.5
    assert abs(x.std() - 1) < 5 / (2 * MILLION)**0.5
    assert abs((x**3).mean()) < 5 * (15 / MILLION)**0.5
    # the sum of n uniforms has kurtosis 3 - 6 / (5 n): 2.9 for twelve
    assert abs((x**4).mean() - 2.9) < 5 * (96 / MILLION)**0.5
    assert x.abs().max() < 6 and x.abs().max() > 4.2
    assert abs((x < 1).double().mean() - 0.8413) < 3e-3


def test_normal_scales_with_std() -> None:
    elements = torch.arange(1000)
    torch.testing.assert_close(normal(7, elements, 0.25), normal(7, elements, 1.0) * 0.25, rtol=0, atol=0)


def test_neighbours_keys_and_names_are_uncorrelated() -> None:
    elements = torch.arange(MILLION)
    x = normal(make_key(1, "a"), elements, 1.0)
    others = [x.roll(1), x.roll(3), normal(make_key(2, "a"), elements, 1.0), normal(make_key(1, "b"), elements, 1.0)]
    for y in others:
        assert abs((x * y).mean()) < 5 / MILLION**0.5


def test_the_values_of_today_are_the_values_of_tomorrow() -> None:
    # a checkpoint's run goes on with the masks it began with, and an old seed starts the same model
    assert make_key(1, "dropout", 5, "layers.3.mlp") == make_key(1, "dropout", 5, "layers.3.mlp")
    assert make_key(1, 23) != make_key(12, 3)
    # splitmix64's published first output for the state 0 is the scramble of its first increment
    golden = torch.tensor([-7046029254386353131])
    assert mix(golden.clone()).item() & (2**64 - 1) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("shape", [(64,), (33, 17), (5, 6, 7)])
def test_any_box_is_bit_equal_to_the_same_part_of_the_whole(shape: tuple[int, ...]) -> None:
    draw = random.Random(len(shape))
    parameter = Parameter("layers.0.x.weight", shape, std=0.02, fill=1.0)
    full = initial_values(parameter, whole(shape), seed=3)
    assert full.std() > 0.01
    for _ in range(50):
        offset = tuple(draw.randrange(n) for n in shape)
        box = Box(offset, tuple(draw.randint(1, n - o) for n, o in zip(shape, offset, strict=True)))
        assert torch.equal(initial_values(parameter, box, seed=3), full[box.slices()])


@pytest.mark.parametrize("chunk", [1, 7, 1000, 4096])
def test_any_chunking_is_bit_equal(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    elements = torch.arange(-500, 1500).reshape(40, 50)
    want = normal(11, elements, 0.5)
    monkeypatch.setattr(counter, "_CHUNK", chunk)
    assert torch.equal(normal(11, elements, 0.5), want)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normal(11, elements.flatten()[order], 0.5), want.flatten()[order])


def test_inputs_are_left_as_they_were() -> None:
    elements = torch.arange(10)
    normal(1, elements, 1.0)
    keep_mask(1, elements, 0.5)
    assert torch.equal(elements, torch.arange(10))


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_the_keep_rate_is_the_one_asked_for(drop: float) -> None:
    kept = keep_mask(make_key(1, "d"), torch.arange(MILLION), drop).double().mean().item()
    assert abs(kept - (1 - drop)) <= 5 * (drop * (1 - drop) / MILLION)**0.5


def test_dropout_keeps_the_mean_and_zeroes_the_share() -> None:
    draw = draw_for(torch.arange(8), range(64), 64, seed=1, step=2)
    y = dropout(torch.ones(8, 64, 256, dtype=torch.float64), 0.25, draw, "layers.0.mlp")
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(y.mean() - 1) < 5 * (0.25 / 0.75 / y.numel())**0.5


def test_a_slice_of_samples_or_positions_drops_the_same_elements() -> None:
    seq, x = 16, torch.randn(6, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = torch.tensor([3, 9, 10, 700, 701, 10**12])
    full = dropout(x, 0.5, draw_for(samples, range(seq), seq, 1, 4), "embedding")
    for rows in (slice(0, 2), slice(3, 6), slice(5, 6)):
        for positions in (range(0, 4), range(4, 12), range(15, 16)):
            part = x[rows, positions.start:positions.stop]
            found = dropout(part, 0.5, draw_for(samples[rows], positions, seq, 1, 4), "embedding")
            assert torch.equal(found, full[rows, positions.start:positions.stop])


@pytest.mark.parametrize(("seed", "step", "site"), [(2, 4, "a"), (1, 5, "a"), (1, 4, "b")])
def test_seed_step_and_site_each_change_the_mask(seed: int, step: int, site: str) -> None:
    x, samples = torch.ones(2, 16, 64), torch.arange(2)
    one = dropout(x, 0.5, draw_for(samples, range(16), 16, 1, 4), "a")
    other = dropout(x, 0.5, draw_for(samples, range(16), 16, seed, step), site)
    assert 0.4 < (one == other).double().mean() < 0.6


def test_no_draw_or_no_rate_passes_x_itself() -> None:
    x = torch.ones(1, 2, 3)
    assert dropout(x, 0.5, None, "a") is x
    assert dropout(x, 0.0, draw_for(torch.arange(1), range(2), 2, 1, 1), "a") is x
