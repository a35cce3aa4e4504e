"""Plans for TPU slices: names, what compiled programs say, one compilation where libtpu is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import types

import jax
import pytest

from benchmarks import tpu
from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import abstract_variables
from train import recipes
from train.job import make_model
from train.step.optimizer import make_optimizer
from train.step.state import create_state
from train.step.step import make_train_step
from train.tools import planning
from train.tools.planning import CHIPS, Plan, copies, estimated_cycles, plan, reduced_bytes, topology_name

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'
KINDS = ['resnext50_32x4d', 'res2net50_26w_4s', 'resnest50d', 'resnest269e']
PROGRAM = """HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[], f32[8]) tuple(%i, %fusion.1)
}

%called (p: f32[8]) -> f32[8] {
  ROOT %fusion.2 = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"7"}
}

%never (p: f32[8]) -> f32[8] {
  ROOT %fusion.9 = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"5000"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %fusion.3 = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"1000"}
  %while.1 = (s32[]) while(%t0), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %copy.1 = bf16[2,8]{0,1:T(8,128)} copy(%fusion.3)
  %copy-start.1 = (f32[9]{0}, f32[9]{0:S(1)}, u32[]) copy-start(%fusion.3), backend_config={}
  %call.1 = f32[8]{0} call(%fusion.3), to_apply=%called
  %all-reduce.1 = (f32[3,3,4]{2,1,0:T(8,128)}, bf16[10]{0}, s32[]) all-reduce(%a, %b, %c), to_apply=%sum
  ROOT %all-reduce-start.2 = f32[100]{0} all-reduce-start(%d), to_apply=%sum
}
"""


def test_cycles_of_a_loop_count_as_often_as_it_runs() -> None:
    assert estimated_cycles(PROGRAM) == 1000 + 4 * 100 + 7


def test_bytes_of_all_reduces() -> None:
    assert reduced_bytes(PROGRAM) == 4 * 36 + 2 * 10 + 4 + 400


def test_copies_the_largest_first() -> None:
    assert copies(PROGRAM) == ((36, 'f32[9]'), (32, 'bf16[2,8]'))


@pytest.mark.parametrize(
    'text, name',
    [
        ('v4-32', 'v4:2x2x4'),
        ('v4:2x2x4', 'v4:2x2x4'),
        ('v5e-16', 'v5e:4x4'),
        ('v5litepod-16', 'v5e:4x4'),
        ('v6e-256', 'v6e:16x16'),
        ('v5p-8', 'v5p:2x2x1'),
    ],
)
def test_slices_by_either_name(text: str, name: str) -> None:
    assert topology_name(text) == name


@pytest.mark.parametrize('text', ['v9-8', 'v4-33', 'v5e', 'v5e:big', 'v4-', ''])
def test_slices_that_there_are_not(text: str) -> None:
    with pytest.raises(FlaxnetsError, match='is no TPU slice known here: v3, v4'):
        topology_name(text)


FOUND = Plan(
    topology='v5e:4x4',
    chip=CHIPS['v5e'],
    devices=16,
    hosts=4,
    batch_size=2048,
    steps=1000,
    available=16 * 2**30,
    memory=10 * 2**30,
    refusal='',
    flops=1.97e12,
    moved=81.9e9,
    reduced=100e6,
    cycles=75e6,
    cores=1,
)


def test_a_step_takes_the_longest_of_three_estimates() -> None:
    assert FOUND.fits
    assert FOUND.seconds == pytest.approx(0.1)  # the bytes: 81.9 GB at 819 GB/s; 10 ms of work, 50 of cycles
    assert dataclasses.replace(FOUND, cycles=300e6).seconds == pytest.approx(0.2)
    assert FOUND.images_per_second == pytest.approx(20480)
    text = FOUND.text()
    assert '10.0 of 16.0 GiB: fits' in text and 'must decode 5,120 images/s' in text


def test_what_does_not_fit_says_so() -> None:
    large = dataclasses.replace(FOUND, memory=17 * 2**30)
    assert not large.fits and 'does NOT fit\na smaller batch_size=' in large.text()
    refused = dataclasses.replace(FOUND, memory=None, refusal='Used 20.1G of 15.75G hbm')
    assert not refused.fits and 'does NOT fit: Used 20.1G' in refused.text()


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FlaxnetsError, match=r'pip install libtpu'):
        plan(recipes.get('digits'), 'v5e-4')


class Compiled:
    """What a program that was lowered gives, in place of libtpu's."""

    def __init__(self, text: str) -> None:
        self.as_text = lambda: text
        self.compile = lambda: self
        self.cost_analysis = lambda: {'flops': 5.0, 'bytes accessed': 6.0}
        sizes = ('argument_size', 'output_size', 'alias_size', 'temp_size', 'generated_code_size')
        found = {f'{name}_in_bytes': 10**i for i, name in enumerate(sizes)}
        self.memory_analysis = lambda: types.SimpleNamespace(**found)


def test_what_a_program_says_of_itself() -> None:
    found = planning.compiled(Compiled(PROGRAM))
    assert (found.memory, found.flops, found.moved) == (1 + 10 - 100 + 1000 + 10000, 5, 6)
    assert (found.cycles, found.copies) == (estimated_cycles(PROGRAM), copies(PROGRAM))


def test_a_compiler_that_writes_no_cycles_is_refused() -> None:
    with pytest.raises(FlaxnetsError, match='no estimated cycles'):
        planning.compiled(Compiled(PROGRAM.replace('estimated_cycles', 'cycles')))


def test_forms_are_compared_where_both_fit() -> None:
    lines = []
    for net, form, program in (
        ('a', 'flaxnets', planning.Program(memory=2**30, cycles=1e6, moved=1e9)),
        ('a', 'plain', planning.Program(memory=2**31, cycles=2e6, moved=4e9, copies=((10**9, 'f32[9]'),))),
        ('b', 'flaxnets', planning.Program(memory=2**30, cycles=1e6, moved=1e9)),
        ('b', 'plain', planning.Program(refusal='Used 20.1G of 15.75G hbm')),
    ):
        lines.append({'net': net, 'slice': 'v5e:4x4', 'what': 'step', 'form': form, **tpu.finding(program)})
    text = tpu.table(lines)
    assert '| step | `a` | v5e:4x4 | 1.0 / 2.0 | 0.50 | 1.0 / 4.0 | 0.25 | 1.00 / 2.00 | 0.50 |' in text
    assert '| step | `b` | v5e:4x4 | 1.0 / too much |  | 1.0 / too much |  | 1.00 / too much |  |' in text
    assert 'step on v5e:4x4, cycles: 0.50 of plain Flax in 1 row ' in text


@pytest.mark.parametrize('name', list(recipes.RECIPES) if FULL else KINDS)
def test_steps_of_the_recipes_lower_for_accelerators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that they turn on, for images of a small size; on a device that holds several GPUs' images."""
    if not FULL:  # one block of each width
        monkeypatch.setitem(zoo.NETS, name, dataclasses.replace(zoo.NETS[name], layers=(1, 1, 1, 1)))
    settings = dataclasses.replace(recipes.get(name), image_size=64, batch_size=256, num_classes=1000)
    model = make_model(settings, 1)
    variables = abstract_variables(model)
    optimizer = make_optimizer(settings, 10, variables['params'])
    state = jax.eval_shape(lambda v: create_state(v, optimizer), variables)
    batch = {
        'image': jax.ShapeDtypeStruct((256, 64, 64, settings.in_chans), 'uint8'),
        'label': jax.ShapeDtypeStruct((256,), 'int32'),
    }
    step = make_train_step(model, optimizer, settings, Preprocess(), epoch_steps=10)
    traced = jax.jit(step).trace(state, batch)
    for platform in ('cuda', 'tpu'):
        assert 'stablehlo.convolution' in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')
def test_a_step_compiles_for_a_slice() -> None:
    found = plan(dataclasses.replace(recipes.get('digits'), model='resnest_tiny'), 'v5e-4')
    assert found.devices == 4 and found.fits
    assert found.cycles > 0 and found.copies and found.reduced > 4 * 550_000  # the gradient, float32
