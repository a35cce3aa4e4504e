"""Options with which timm builds a net that change what it computes, but none of its tensors.

Reference: timm's `create_model` and `ResNet.__init__`; the options of its `train.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxnets.errors import shown
from flaxnets.words import plain

from ..formats.pth import Inert

# Options that only training uses, or that the tensors' names and shapes show.
_HARMLESS = frozenset(
    [
        'num_classes',
        'in_chans',
        'drop_rate',
        'drop_path_rate',
        'drop_block_rate',
        'drop_connect_rate',
        'zero_init_last',
        'pretrained',
        'pretrained_cfg',
        'pretrained_cfg_overlay',
        'pretrained_strict',
        'checkpoint_path',
        'cache_dir',
        'features_only',
        'out_indices',
        'feature_cfg',
        'scriptable',
        'exportable',
        'jit',
        'no_jit',
        'strict',
        'bn_momentum',
        'bn_tf',
        'layers',
        'cardinality',
        'base_width',
        'stem_width',
        'stem_type',
        'avg_down',
        'channels',
        'device',
        'dtype',
    ]
)
# Values with which timm's nets compute what those here do.
_USUAL: dict[str, tuple[object, ...]] = {
    'global_pool': ('avg', ''),
    'output_stride': (32,),
    'act_layer': ('relu',),
    'norm_layer': ('batchnorm', 'batchnorm2d'),
    'bn_eps': (1e-5,),
    'attn_layer': ('se',),
    'aa_layer': ('',),
    'down_kernel_size': (1,),
    'reduce_first': (1,),
    'block_reduce_first': (1,),
    'replace_stem_pool': (False,),
}
_USUAL_CLASSES = {'act_layer': ('ReLU',), 'norm_layer': ('BatchNorm2d',)}
_OURS = ('global_pool', 'output_stride')  # that `flaxnets.load` takes too
_CONTAINERS = ('args', 'hyper_parameters', 'hparams', 'config', 'cfg', 'opt')


def changing(arguments: Mapping[Any, Any]) -> dict[str, Any]:
    """Those of timm's arguments that change what a net computes; no directory of weights records them."""
    return {
        str(name): value
        for name, value in arguments.items()
        if name not in _HARMLESS and value is not None and not _is_usual(name, value)
    }


def described(changes: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The note for the user on arguments that `changing` found; `where` is the place that gives them."""
    if not changes:
        return ()
    listed = ', '.join(f'{plain(name)}={_shown(value)}' for name, value in changes.items())
    remedy = (
        f': give {listed} to flaxnets.load'
        if changes.keys() <= set(_OURS)
        else ', which none of the nets here computes'
    )
    return (f'{where} builds its net with {listed}{remedy}',)


def other_options(around: Mapping[Any, Any]) -> tuple[str, ...]:
    """What a training file says of its net, in timm's words, that none of the nets here computes.

    Args:
      around: what stands beside the weights: timm's `args`, Lightning's `hyper_parameters`, ...
    """
    out: tuple[str, ...] = ()
    for name in _CONTAINERS:
        options = around.get(name)
        if not isinstance(options, Mapping):
            continue
        given: dict[Any, Any] = {}
        if name == 'args':
            pool = options.get('gp')
            given = {'global_pool': pool if isinstance(pool, str) else None, 'bn_eps': options.get('bn_eps')}
        more = options.get('model_kwargs')
        if isinstance(more, Mapping):
            given |= more
        out += described(changing(given), name)
    return out


def _is_usual(name: object, value: object) -> bool:
    if isinstance(value, Inert):  # a class, in the pickle of a training file
        return value.names[0].rpartition('.')[2] in _USUAL_CLASSES.get(str(name), ())
    usual = _USUAL.get(str(name), ())
    return value in usual if isinstance(value, str | int | float) else False


def _shown(value: object) -> str:
    return plain(value.names[0]) if isinstance(value, Inert) else shown(value)
