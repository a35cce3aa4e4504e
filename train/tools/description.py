"""Describes a run before it begins, as text: its settings, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any

import jax

import flaxnets
from flaxnets.nets.resnet import abstract_variables

from .. import parallel
from ..fields import Field, as_text
from ..job import expected_images
from ..notes import about_images, without_effect
from ..settings import FIELDS, PLAIN, Settings, complete, validate
from ..step.optimizer import decays, is_frozen, path_of
from ..step.schedule import count_steps, drop_block, learning_rate


def describe(settings: Settings, examples: int, devices: int) -> str:
    """All settings, those that are not the defaults marked, and the run that they make.

    Args:
      settings: of the run.
      examples: how many training images there are.
      devices: how many devices all hosts have together.

    Raises:
      FlaxnetsError: the settings are bad, or do not fit the data or the devices.
    """
    validate(settings)
    given, expected = settings, expected_images(settings)
    settings = complete(given, expected or PLAIN)
    parallel.check_batch(settings.batch_size, settings.accumulation, devices)
    lines = ['settings (* differs from the default)']
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        mark = ' ' if getattr(given, field.name) == field.default else '*'
        lines.append(f'{mark} {field.name:20} {as_text(value)}')
    lines += ['', *_run(settings, examples, devices), '', *_rates(settings, examples), '', *_net(settings)]
    notes = [
        *about_images(given, settings, expected),
        *without_effect(settings, *count_steps(settings, examples), devices),
    ]
    lines += ['', *(f'{note.kind}: {note.message}' for note in notes)] if notes else []
    return '\n'.join(lines)


def fields_as_text() -> str:
    """Every field with its default, its values and its meaning, for a terminal."""
    lines = []
    for field in FIELDS.values():
        lines += [f'\n{field.chapter}'] if field.chapter else []
        lines.append(f'  {field.name}{f" ({_default(field)})" if _default(field) else ""}')
        said = f'{field.what} [{field.values_words}]'
        lines += textwrap.wrap(said, 100, initial_indent=6 * ' ', subsequent_indent=6 * ' ')
    return '\n'.join(lines).lstrip()


def fields_as_markdown() -> str:
    """The same in the form of `docs/settings.md`."""
    lines = [
        '# Settings of a training run',
        '',
        'Every field can be given as `field=value`; `python -m train fields` shows them in a terminal. A run',
        'may be resumed with other values of those marked "yes". This page is written by',
        '`python -m train fields --markdown > docs/settings.md`.',
    ]
    for field in FIELDS.values():
        if field.chapter:
            lines += ['', f'## {field.chapter}', '']
            lines += ['| field | default | values | at a resume | meaning |', '|---|---|---|---|---|']
        default = f'`{_default(field)}`' if _default(field) else ''
        change = 'yes' if field.may_change else ''
        what = field.what.replace('*', r'\*')  # else what stands between two is set in italics
        lines.append(f'| `{field.name}` | {default} | {field.values_words} | {change} | {what} |')
    return '\n'.join(lines)


def _default(field: Field) -> str:
    return '' if field.default in (dataclasses.MISSING, '', ()) else as_text(field.default)


def _run(s: Settings, examples: int, devices: int) -> list[str]:
    """Batches, steps and BatchNorm's groups."""
    epoch_steps, total = count_steps(s, examples)
    local = s.batch_size // devices
    parts = f', in {s.accumulation} parts of {local // s.accumulation}' if s.accumulation > 1 else ''
    span = parallel.bn_span(s.bn_images, s.batch_size, s.accumulation, devices)
    seen = local // s.accumulation
    if span.axis_name is None:
        images, where = seen // span.parts, 'on each device'
    else:
        together = len(span.device_groups[0]) if span.device_groups else devices
        images, where = seen * together, f'over {together} devices'
    return [
        f'global batch         {s.batch_size} images: {local} on each of {devices} devices{parts}',
        f'an epoch             {epoch_steps} steps, {epoch_steps * s.batch_size} of {examples} images',
        f'the run              {total} steps, {total / epoch_steps:g} epochs',
        f'BatchNorm            over {images} images, {where}',
    ]


def _rates(s: Settings, examples: int) -> list[str]:
    """Learning rates (and DropBlock's) at the steps where something begins or ends."""
    epoch_steps, total = count_steps(s, examples)
    rate, drop = learning_rate(s, epoch_steps), drop_block(s, epoch_steps)
    steps = {'first step': 0, 'middle': total // 2, 'last step': total - 1}
    if s.warmup_epochs:
        warmed_up = min(s.warmup_epochs * epoch_steps, total - 1)
        steps = {'first step': 0, 'end of warm-up': warmed_up, **steps}
    lines = []
    for name, step in steps.items():
        more = f', DropBlock {drop(step):.4g}' if s.drop_block_rate else ''
        lines.append(f'learning rate        {rate(step):.6g} at step {step} ({name}){more}')
    return lines


def _net(s: Settings) -> list[str]:
    """What decays and what is frozen, in parameters."""
    model = flaxnets.create(s.model, s.num_classes or 1000, s.in_chans)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(model)['params'])
    sizes = {path_of(keys): math.prod(leaf.shape) for keys, leaf in leaves}
    trained = {path: size for path, size in sizes.items() if not is_frozen(s, path)}
    decaying = (
        {path: size for path, size in trained.items() if decays(s.decay, path)} if s.weight_decay else {}
    )
    classes = '' if s.num_classes else ' with 1000 classes (the number is taken from the data)'
    lines = [f'parameters           {_count(sizes)}{classes}']
    if s.frozen_stages:
        lines.append(f'trained              {_count(trained)}')
    lines.append(f'weight decay         {s.weight_decay:g} on {_count(decaying)}')
    return lines


def _count(sizes: dict[Any, int]) -> str:
    return f'{sum(sizes.values()):,} in {len(sizes)} arrays'
