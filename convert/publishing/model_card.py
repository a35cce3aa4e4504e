"""Writes the model card, README.md: a repository's page, with YAML at its head that the hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from flaxnets.nets.resnet import abstract_variables, build, count_macs, count_parameters
from flaxnets.store.weights import Source
from flaxnets.version import VERSION
from flaxnets.zoo.records import Config

from .facts import NOT_IN_TIMM, UNKNOWN, Facts, Measured

CARD_FILE = 'README.md'
SHOWN_CLASSES = 20

_BLOCKS = {
    'resnext': ('ResNeXt', 'Aggregated Residual Transformations for Deep Neural Networks', '1611.05431'),
    'res2net': ('Res2Net', 'Res2Net: A New Multi-scale Backbone Architecture', '1904.01169'),
    'resnest': ('ResNeSt', 'ResNeSt: Split-Attention Networks', '2004.08955'),
}


def card(config: Config, source: Source, facts: Facts, where: str, *, is_local: bool) -> str:
    """The text of `README.md`.

    Args:
      config: the configuration of the weights.
      source: where they came from.
      facts: licence and accuracy.
      where: the repository ('org/name') or the folder that holds the weights.
      is_local: whether `where` is a folder.
    """
    parts = [
        _head(config, facts, where),
        f'# {_title(where)}\n\n{_summary(config)}',
        _section('The net', _table(_net_rows(config))),
        _section('Its images', _table(_image_rows(config))),
        _section('Accuracy', _accuracy(facts.accuracy)),
        _section('Open it', _usage(config, where, is_local)),
        _section('Classes', _classes(config)),
        _section('Where the weights come from', _origin(config, source)),
        _section('Licence', _licence(facts)),
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def _head(config: Config, facts: Facts, where: str) -> str:
    """The YAML; texts are quoted as in JSON, which is valid YAML."""
    in_timm = config.name not in NOT_IN_TIMM
    library = 'timm' if in_timm else 'flaxnets'
    kind = 'image-classification' if config.num_classes else 'image-feature-extraction'
    lines = [
        '---',
        f'license: {facts.licence}',
        f'library_name: {library}',
        f'pipeline_tag: {kind}',
        'tags:',
        *(f'- {tag}' for tag in (kind, *(['timm'] if in_timm else []), 'flaxnets', 'jax', config.arch.block)),
    ]
    if config.weights and '_in1k' in f'_{config.weights.tag}':
        lines += ['datasets:', '- imagenet-1k']
    if facts.accuracy:
        lines += _model_index(facts.accuracy[0], _title(where))
    return '\n'.join([*lines, '---'])


def _model_index(measured: Measured, name: str) -> list[str]:
    data = json.dumps(measured.data)
    lines = [
        'model-index:',
        f'- name: {json.dumps(name)}',
        '  results:',
        '  - task:',
        '      type: image-classification',
        '    dataset:',
        f'      name: {data}',
        f'      type: {json.dumps(re.sub("[^a-z0-9]+", "-", measured.data.lower()).strip("-"))}',
        '    metrics:',
    ]
    for kind, value in (('Top-1', measured.top1), ('Top-5', measured.top5)):
        if value is not None:
            lines += [
                '    - type: accuracy',
                f'      value: {round(value, 3)}',
                f'      name: {kind} accuracy',
            ]
    return lines


def _title(where: str) -> str:
    return where.rstrip('/').rpartition('/')[2]


def _section(title: str, body: str) -> str:
    return f'## {title}\n\n{body}' if body else ''


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    return '\n'.join(['| | |', '|---|---|', *(f'| {name} | {_cell(value)} |' for name, value in rows)])


def _cell(value: object) -> str:
    return str(value).replace('|', '\\|').replace('\n', ' ')


def _summary(config: Config) -> str:
    family, paper, number = _BLOCKS[config.arch.block]
    what = f'for {config.num_classes} classes' if config.num_classes else 'without a classifier, for features'
    of = f'`{config.weights.name}`' if config.weights else f'`{config.name}`'
    return (
        f'{of}: a {family} ([{paper}](https://arxiv.org/abs/{number})) {what}. '
        f"The tensors have timm's names; written by flaxnets {VERSION}."
    )


def _net_rows(config: Config) -> Iterable[tuple[str, Any]]:
    net = build(config.arch, config.num_classes, config.in_chans)
    size = (config.preprocess.height, config.preprocess.width)
    yield 'architecture', f'`{config.name}`'
    yield 'parameters', f'{count_parameters(abstract_variables(net)) / 1e6:.1f} M'
    yield f'multiply-accumulates at {size[0]} x {size[1]}', f'{count_macs(net, size) / 1e9:.2f} G'
    yield 'outputs', config.num_classes or f'{net.num_features} features'


def _image_rows(config: Config) -> Iterable[tuple[str, Any]]:
    preprocess = config.preprocess
    yield 'size', f'{preprocess.height} x {preprocess.width}, {config.in_chans} channels'
    yield 'crop', f'{preprocess.crop_pct:g} ({preprocess.crop_mode})'
    yield 'interpolation', preprocess.interpolation
    yield 'mean', ', '.join(f'{value:g}' for value in preprocess.mean)
    yield 'standard deviation', ', '.join(f'{value:g}' for value in preprocess.std)
    for problem in preprocess.unsupported:
        yield 'besides, which neither timm nor flaxnets does', problem
    for what in preprocess.approximations:
        yield 'only nearly as in the training', what


def _accuracy(accuracy: Sequence[Measured]) -> str:
    if not accuracy:
        return 'Not evaluated.'
    lines = ['| data | images | top-1 | top-5 | by |', '|---|---|---|---|---|']
    for one in accuracy:
        top5 = '' if one.top5 is None else f'{one.top5:.2f} %'
        cells = (
            _cell(one.data),
            one.images or '',
            f'{one.top1:.2f} %',
            top5,
            _cell(one.source or 'flaxnets'),
        )
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def _usage(config: Config, where: str, is_local: bool) -> str:
    in_flaxnets = repr(where if is_local else f'hf-hub:{where}')
    in_timm = repr(f'local-dir:{where}' if is_local else f'hf-hub:{where}')
    prepare = f"images = flaxnets.transform({in_flaxnets})('photo.jpg')[None]"
    if config.in_chans not in (1, 3):
        prepare = (
            f'# images: float32 [N, {config.preprocess.height}, {config.preprocess.width}, {config.in_chans}]'
        )
    result = 'logits' if config.num_classes else 'features'
    lines = [
        'With flaxnets, in JAX:',
        '',
        '```python',
        'import flaxnets',
        '',
        f'model, variables = flaxnets.load({in_flaxnets})',
        prepare,
        f'{result} = model.apply(variables, images)  # [N, {config.num_classes or "features"}]',
        '```',
    ]
    if config.name in NOT_IN_TIMM:
        return '\n'.join([*lines, '', f'timm has no net called `{config.name}`.'])
    lines += [
        '',
        'With timm, in PyTorch:',
        '',
        '```python',
        'import timm',
        '',
        f'model = timm.create_model({in_timm}, pretrained=True).eval()',
        'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))',
        '```',
    ]
    return '\n'.join(lines)


def _classes(config: Config) -> str:
    if config.classes is None:
        return ''
    names = [f'`{name.replace("`", chr(39))}`' for name in config.classes[:SHOWN_CLASSES]]
    more = len(config.classes) - len(names)
    return ', '.join(names) + (f', and {more} more in `config.json`' if more else '')


def _origin(config: Config, source: Source) -> str:
    lines = []
    if source.file:
        digest = f', SHA-256 `{source.sha256}`' if source.sha256 else ''
        lines.append(f'- from `{source.file}`{digest}')
    if config.weights:
        lines += [f'- published as <{url}>' for url in config.weights.urls[:1]]
    lines += [f'- {_cell(note)}' for note in source.notes if not note.startswith('images: ')]
    return '\n'.join(lines)


def _licence(facts: Facts) -> str:
    return 'Not stated.' if facts.licence == UNKNOWN else f'`{facts.licence}`'
