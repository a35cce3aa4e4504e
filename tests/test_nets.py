"""The nets themselves: sizes, names, options, what acts in training and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from nets import random_variables, shallow, timm_net

import flaxnets
from convert.names.tree import entries
from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.nets.arch import Arch
from flaxnets.nets.blocks import Block, SplitAttention
from flaxnets.nets.layers import BatchNorm, Conv, DropBlock, DropPath, Span
from flaxnets.nets.pooling import avg_pool_3x3, avg_pool_shortcut
from flaxnets.nets.resnet import FeatureInfo, ResNet, abstract_variables, build, count_macs, count_parameters

# name: (input size, parameters, multiply-accumulates of convolutions and classifier, state dict keys
# with and without num_batches_tracked). Computed from the papers' and timm's definitions, not from here.
COUNTS = {
    'res2net50_26w_4s': (224, 25_699_120, 4_255_166_464, 512, 427),
    'res2net50_48w_2s': (224, 25_287_304, 4_159_832_064, 320, 267),
    'res2net50_14w_8s': (224, 25_059_816, 4_178_898_944, 896, 747),
    'res2net50_26w_6s': (224, 37_051_448, 6_295_523_328, 704, 587),
    'res2net50_26w_8s': (224, 48_403_776, 8_335_880_192, 896, 747),
    'res2net101_26w_4s': (224, 45_206_688, 8_066_974_464, 1022, 852),
    'res2net50d': (224, 25_718_352, 4_494_807_040, 524, 437),
    'res2net101d': (224, 45_225_920, 8_306_615_040, 1034, 862),
    'res2next50': (224, 24_671_464, 4_172_677_120, 512, 427),
    'resnext50_32x4d': (224, 25_028_904, 4_230_479_872, 320, 267),
    'resnext50d_32x4d': (224, 25_048_136, 4_470_120_448, 332, 277),
    'resnext101_32x4d': (224, 44_177_704, 7_969_996_800, 626, 522),
    'resnext101_32x8d': (224, 88_791_336, 16_414_015_488, 626, 522),
    'resnext101_64x4d': (224, 83_455_272, 15_460_270_080, 626, 522),
    'resnext101_32x16d': (224, 194_026_792, 36_163_289_088, 626, 522),
    'resnext101_32x32d': (224, 468_530_472, 87_106_781_184, 626, 522),
    'resnext101_32x48d': (224, 828_411_176, 153_310_199_808, 626, 522),
    'resnext152_32x4d': (224, 59_951_400, 11_709_513_728, 932, 777),
    'seresnext50_32x4d': (224, 27_559_896, 4_232_994_816, 384, 331),
    'seresnext101_32x4d': (224, 48_955_416, 7_974_739_968, 758, 654),
    'seresnext101_64x4d': (224, 88_232_984, 15_465_013_248, 758, 654),
    'resnest14d': (224, 10_611_688, 2_749_405_184, 152, 129),
    'resnest26d': (224, 17_069_448, 3_623_391_232, 260, 221),
    'resnest50d': (224, 27_483_240, 5_371_160_576, 476, 405),
    'resnest101e': (256, 48_275_016, 13_321_472_000, 935, 796),
    'resnest200e': (320, 70_201_544, 35_519_694_848, 1826, 1555),
    'resnest269e': (416, 110_929_480, 77_348_702_208, 2447, 2084),
    'resnest50d_4s2x40d': (224, 30_417_592, 4_369_060_736, 476, 405),
    'resnest50d_1s4x24d': (224, 25_677_000, 4_399_827_456, 476, 405),
    'resnest50_fast_1s1x64d': (224, 26_217_896, 4_329_459_712, 476, 405),
    'resnest50_fast_2s1x64d': (224, 27_483_240, 4_330_711_040, 476, 405),
    'resnest50_fast_4s1x64d': (224, 31_912_712, 4_335_112_192, 476, 405),
    'resnest50_fast_1s2x40d': (224, 25_946_680, 4_364_642_816, 476, 405),
    'resnest50_fast_2s2x40d': (224, 26_943_792, 4_365_622_336, 476, 405),
}

TINY = {
    'resnext': Arch('resnext', (1, 1, 1, 2), 4, 32, planes=8),
    'res2net': Arch('res2net', (1, 1, 1, 2), 1, 32, scale=4, planes=8),
    'resnest': Arch(
        'resnest', (1, 1, 1, 2), 2, 32, radix=2, deep_stem=True, stem_width=8, avg_down=True, planes=8
    ),
}


def random_images(n: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, side, side, 3)).astype(np.float32)


def stage_in_training(model: ResNet, maps: jax.Array, stage: int) -> jax.Array:
    """One stage alone, for `apply(method=...)`: compiled in a fifth of the time of the net."""
    y: jax.Array = getattr(model, f'layer{stage}')(maps, True)
    return y


def test_counts_cover_the_zoo() -> None:
    assert set(COUNTS) == set(zoo.ARCHS)


@pytest.mark.parametrize('name', COUNTS)
def test_counts_names_order_and_shapes(name: str) -> None:
    size, parameters, macs, keys, keys_without_counters = COUNTS[name]
    model = flaxnets.create(name)
    assert count_parameters(abstract_variables(model)) == parameters
    assert count_macs(model, size) == macs
    tensors = entries(model)
    assert len(tensors) == keys_without_counters
    assert len(tensors) + sum(key.endswith('running_mean') for key in tensors) == keys
    with torch.device('meta'):
        reference = timm_net(name)
    theirs = {
        k: tuple(t.shape) for k, t in reference.state_dict().items() if not k.endswith('num_batches_tracked')
    }
    ours = {key: entry.torch_shape for key, entry in tensors.items()}
    assert list(ours.items()) == list(theirs.items())


# --- options


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('name', ['res2net50d', 'resnest101e'])
def test_feature_info_is_timms(name: str, output_stride: int) -> None:
    kwargs: dict[str, Any] = dict(features_only=True, output_stride=output_stride, out_indices=(0, 2, 4))
    with torch.device('meta'):
        reference = timm.create_model(name, **kwargs).feature_info
    model = flaxnets.create(name, **kwargs)
    model = model.clone(
        arch=dataclasses.replace(model.arch, layers=(1, 1, 1, 2))
    )  # those left out keep the size
    assert [f.channels for f in model.feature_info] == reference.channels()
    assert [f.reduction for f in model.feature_info] == reference.reduction()
    assert [f.name for f in model.feature_info] == reference.module_name()
    maps = jax.eval_shape(
        lambda v, x: model.apply(v, x),
        abstract_variables(model),
        jax.ShapeDtypeStruct((2, 64, 96, 3), 'float32'),
    )
    expected = [(2, 64 // f.reduction, 96 // f.reduction, f.channels) for f in model.feature_info]
    assert [m.shape for m in maps] == expected


@pytest.mark.parametrize(
    'out_indices, names', [((1,), ['layer1']), (2, ['layer3', 'layer4']), ((-1,), ['layer4'])]
)
@pytest.mark.usefixtures('unchecked')  # lists in place of tuples are not hashable
def test_features_only_has_no_parameters_it_does_not_use(out_indices: Any, names: list[str]) -> None:
    model = build(TINY['resnest'], features_only=True, out_indices=out_indices)
    assert [f.name for f in model.feature_info] == names
    layers = set(abstract_variables(model)['params'])
    last = int(names[-1][-1])
    assert layers == {'conv1', 'bn1', *(f'layer{i}' for i in range(1, last + 1))}
    same = model.clone(out_indices=list(model.out_indices), bn_span=Span('batch', [[0, 1]]))  # type: ignore[arg-type]
    assert abstract_variables(same) == abstract_variables(model)


@jax.enable_x64(True)  # the programs round differently
def test_head_methods() -> None:
    model = shallow(build(TINY['resnext'], num_classes=7, dtype='float64', param_dtype='float64'))
    images = random_images(2, 64)
    variables = random_variables(model)
    features = jax.jit(partial(model.apply, method='forward_features'))(variables, images)
    pooled = model.apply(variables, features, pre_logits=True, method='forward_head')
    logits = model.apply(variables, features, method='forward_head')
    assert (features.shape, pooled.shape, logits.shape) == ((2, 8, 8, 64), (2, 64), (2, 7))
    np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, images), rtol=1e-9)
    headless = model.clone(num_classes=0)
    assert 'fc' not in abstract_variables(headless)['params']
    np.testing.assert_allclose(pooled, jax.jit(headless.apply)(variables, images), rtol=1e-9)


def test_feature_info_of_a_plain_net() -> None:
    assert flaxnets.create('resnest101e').feature_info[:2] == (
        FeatureInfo('act1', 128, 2),
        FeatureInfo('layer1', 256, 4),
    )


BAD = [
    (dict(num_classes=-1), 'num_classes=-1'),
    (dict(num_classes=10.0), 'num_classes=10.0'),
    (dict(in_chans=0), 'in_chans=0'),
    (dict(global_pool='mean'), "global_pool='mean'"),
    (dict(global_pool=''), "global_pool=''.*num_classes=0"),
    (dict(output_stride=4), 'output_stride=4'),
    (dict(drop_rate=1.0), 'drop_rate=1.0'),
    (dict(drop_path_rate=-0.1), 'drop_path_rate=-0.1'),
    (dict(drop_block_rate='a'), "drop_block_rate='a'"),
    (dict(dtype='int32'), "dtype='int32'"),
    (dict(param_dtype='float99'), "param_dtype='float99'"),
    (dict(features_only=True, out_indices=(5,)), r'out_indices=\(5,\)'),
    (dict(features_only=True, out_indices=()), r'out_indices=\(\)'),
    (dict(features_only=True, out_indices=None), 'out_indices=None'),
    (dict(axis_name=3), 'axis_name=3'),
    (dict(remat='no'), "remat='no'"),
    (dict(zero_init_last=1, folded=0), 'zero_init_last=1.*folded=0'),
]


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize('options, message', BAD, ids=[message for _, message in BAD])
def test_bad_values_are_refused_by_name_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FlaxnetsError, match=message):
        flaxnets.create('resnext50_32x4d', **options)


def test_all_bad_values_in_one_message() -> None:
    with pytest.raises(FlaxnetsError, match='num_classes=-1.*in_chans=0.*output_stride=7'):
        flaxnets.create('resnext50_32x4d', num_classes=-1, in_chans=0, output_stride=7)


def test_unknown_option_and_unknown_net() -> None:
    with pytest.raises(TypeError, match='drop_rat'):
        flaxnets.create('resnext50_32x4d', drop_rat=0.1)
    with pytest.raises(FlaxnetsError, match='resnest50d'):
        flaxnets.create('resnest50dd')


@pytest.mark.usefixtures('unchecked')
def test_wrong_images_are_refused() -> None:
    model = build(TINY['resnext'])
    variables = abstract_variables(model)
    for shape in ((1, 3, 64, 64), (64, 64, 3)):
        with pytest.raises(FlaxnetsError, match=re.escape(str(shape))):
            jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct(shape, 'float32'))


@pytest.mark.parametrize('kind', TINY)
def test_bfloat16(kind: str) -> None:
    images = random_images(2, 32)
    exact, half = (shallow(build(TINY[kind], 10, dtype=dtype)) for dtype in ('float32', 'bfloat16'))
    variables = random_variables(exact)
    logits = jax.jit(half.apply)(variables, images)
    assert logits.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract_variables(half)))
    expected = jax.jit(exact.apply)(variables, images)
    assert jnp.abs(logits - expected).max() < 0.05 * jnp.abs(expected).max()


@pytest.mark.parametrize('kind', TINY)
def test_remat_changes_no_gradient(kind: str) -> None:
    with jax.enable_x64(True):  # in float32 a ReLU at 0 may open in one program and not in the other
        plain = build(TINY[kind], 10, dtype='float64', param_dtype='float64')
        variables = random_variables(plain)
        maps = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, plain.arch.stem_channels)))

        def gradient(model: ResNet) -> Any:
            def loss(params: Any) -> Any:
                both = {**variables, 'params': params}
                y, _ = model.apply(both, maps, 1, method=stage_in_training, mutable=['batch_stats'])
                return jnp.square(y).mean()

            return jax.jit(jax.grad(lambda params: loss({**variables['params'], 'layer1': params})))

        params = variables['params']['layer1']
        bare, wrapped = (gradient(model).trace(params) for model in (plain, plain.clone(remat=True)))
        assert str(wrapped.jaxpr).count('remat') > str(bare.jaxpr).count('remat')
        a, b = (traced.lower().compile()(params) for traced in (bare, wrapped))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), a, b)


# --- initialisation


def test_initialisation_is_torchs() -> None:
    torch.manual_seed(0)
    reference = {k: t.detach().numpy() for k, t in timm_net('resnest14d').state_dict().items()}
    model = flaxnets.create('resnest14d')
    parts = ('conv1', 'bn1', 'layer2', 'fc')  # of the stages one is enough; jit drops what is not asked for

    @jax.jit
    def initial() -> Any:
        variables = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        return {name: {p: tree[p] for p in parts if p in tree} for name, tree in variables.items()}

    variables = jax.device_get(initial())
    for key, entry in entries(model).items():
        if entry.path[1] not in parts:
            continue
        ours: Any = variables
        for part in entry.path:
            ours = ours[part]
        theirs = reference[key]
        if theirs.std() == 0:
            np.testing.assert_array_equal(ours, theirs, err_msg=key)
        elif ours.size >= 2000:  # moments of a random tensor; both are samples
            assert abs(ours.mean()) < 5 * theirs.std() / theirs.size**0.5 + 1e-6, key
            assert ours.std() == pytest.approx(theirs.std(), rel=0.1), key
            assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=0.5), key
        elif key.endswith('bias'):  # uniform: its bound tells it from any other
            bound = 1 / np.sqrt(np.prod(reference[key.replace('bias', 'weight')].shape[1:]))
            assert 0.7 * bound < np.abs(ours).max() <= bound, key


def test_zero_init_last() -> None:
    def scales(**options: Any) -> list[float]:
        model = build(TINY['res2net'], **options)

        @jax.jit  # drops all that is not asked for
        def run() -> list[jax.Array]:
            params = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))['params']
            return [params[f'layer{i}']['0']['bn3']['scale'].max() for i in range(1, 5)]

        return [float(scale) for scale in run()]

    assert scales() == [0] * 4
    assert scales(zero_init_last=False) == [1] * 4


# --- pools


@pytest.mark.parametrize('images', [1, 8])
@pytest.mark.parametrize('stride', [1, 2])
def test_average_pools_of_small_maps(stride: int, images: int) -> None:
    """XLA's fusions for CPUs (jaxlib 0.10.2) sum windows of two over a side of one pixel wrongly."""
    rng = np.random.default_rng(0)
    maps = [
        rng.normal(size=(images, *sides, 256)).astype(np.float32)
        for sides in ((1, 1), (1, 3), (3, 1), (2, 3))
    ]
    shortcut = torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    found = jax.jit(lambda maps: [(avg_pool_shortcut(x, stride), avg_pool_3x3(x, stride)) for x in maps])(
        maps
    )
    for x, (two, three) in zip(maps, found, strict=True):
        nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
        padded = torch.nn.functional.pad(nchw, (0, 1, 0, 1))
        expected = shortcut(nchw) if stride == 2 else torch.nn.AvgPool2d(2, 1)(padded)
        np.testing.assert_allclose(two, expected.permute(0, 2, 3, 1), atol=1e-6)
        expected = torch.nn.AvgPool2d(3, stride, padding=1)(nchw)
        np.testing.assert_allclose(three, expected.permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize('kind', ['float16', 'bfloat16'])
@pytest.mark.parametrize('stride', [1, 2])
def test_average_pools_of_half_precision_are_rounded_once(stride: int, kind: str) -> None:
    """As torch does it: sums of float16 would be infinite, and those of bfloat16 rounded each time."""
    rng = np.random.default_rng(0)
    large = jnp.full((1, 9, 9, 2), 20000, kind)
    for x in (jnp.asarray(rng.normal(size=(2, 9, 9, 4)), kind), large):
        nchw = torch.from_numpy(np.asarray(x, np.float32).transpose(0, 3, 1, 2)).to(getattr(torch, kind))
        pairs = [(avg_pool_3x3(x, stride), torch.nn.AvgPool2d(3, stride, padding=1)(nchw))]
        if stride == 2:
            shortcut = torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
            pairs.append((avg_pool_shortcut(x, 2), shortcut(nchw)))
        for found, expected in pairs:
            assert found.dtype == x.dtype
            np.testing.assert_array_equal(
                np.asarray(found, np.float32), expected.float().permute(0, 2, 3, 1).numpy()
            )


@pytest.mark.parametrize('kind', ['resnext', 'res2net', 'resnest'])
def test_no_images(kind: str) -> None:
    model = shallow(build(TINY[kind], num_classes=7, global_pool='catavgmax'))
    assert model.apply(random_variables(model), jnp.ones((0, 32, 32, 3))).shape == (0, 7)


# --- layers in training


@jax.enable_x64(True)
@pytest.mark.parametrize('train', [False, True])
def test_batch_norm_computes_float64_with_parameters_of_float32(train: bool) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 6, 7)))
    layers = [BatchNorm(dtype='float64', param_dtype=kind) for kind in ('float32', 'float64')]
    found, expected = (layer.init_with_output(jax.random.key(0), x, train) for layer in layers)
    if train:  # the first call only makes the parameters
        found, expected = (
            layer.apply(variables, x, True, mutable=['batch_stats'])
            for layer, (_, variables) in zip(layers, (found, expected), strict=True)
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(found[1])} == {np.dtype('float32')}
        np.testing.assert_allclose(
            found[1]['batch_stats']['var'], expected[1]['batch_stats']['var'], rtol=1e-6
        )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12, atol=1e-12)


def batch_norm(features: int) -> dict[str, Any]:
    """The layer's variables at the start."""
    zeros, ones = np.zeros(features, np.float32), np.ones(features, np.float32)
    return {'params': {'scale': ones, 'bias': zeros}, 'batch_stats': {'mean': zeros, 'var': ones}}


def batch_norm_in_training(span: Span) -> Any:
    """(variables, x) -> the layer's result and its new statistics, compiled."""

    def run(variables: Any, x: Any) -> Any:
        return BatchNorm(span=span).apply(variables, x, True, mutable=['batch_stats'])

    return jax.pmap(run, 'batch', in_axes=(None, 0)) if span.axis_name else jax.jit(run)


def test_batch_norm_keeps_torchs_running_statistics() -> None:
    x = np.random.default_rng(0).normal(2, 3, (4, 5, 6, 7)).astype(np.float32)
    reference = torch.nn.BatchNorm2d(7)
    variables, train = batch_norm(7), batch_norm_in_training(Span())
    for _ in range(3):
        expected = reference(torch.from_numpy(x.transpose(0, 3, 1, 2)))
        y, changed = train(variables, x)
        variables = {**variables, **changed}
    np.testing.assert_allclose(y, expected.detach().numpy().transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(changed['batch_stats']['mean'], reference.running_mean, rtol=1e-5)
    np.testing.assert_allclose(changed['batch_stats']['var'], reference.running_var, rtol=1e-5)


OFFSETS = {'all': 1000.0, 'by channel': 10.0 ** np.arange(-3, 4), 'by image': 1.0}


@pytest.mark.parametrize('case', [*OFFSETS, 'bfloat16', 'float16', 'one row', 'constant'])
def test_batch_norm_is_torchs_where_the_mean_is_large(case: str) -> None:
    """Output, running statistics and gradients, over the batch, parts, devices and groups of devices."""
    rng = np.random.default_rng(0)
    noise, shape = rng.normal(size=(8, 5, 6, 7)), (8, 1, 1, 1)
    offset = OFFSETS.get(case, 1000.0)
    x = offset + 0.05 * noise
    if case == 'by image':
        x = 1000 + 100 * rng.normal(size=shape) + 0.05 * noise
    if case == 'one row':  # that of the middle, from which the statistics start, tells nothing of the rest
        x = 0.05 * noise
        x[:, 2] += 1000
    if case == 'constant':
        x = np.full_like(noise, 1000.1)
    dtype = case if 'float' in case else 'float32'
    x = np.asarray(jnp.asarray(x, dtype))
    dy = rng.normal(size=x.shape).astype(np.float32)
    scale, bias = rng.normal(size=(2, 7)).astype(np.float32)

    def theirs(x: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
        # In float64, as torch sums on CPUs: a mean in float32 would leave an error of 0.001 in all outputs.
        layer = torch.nn.BatchNorm2d(7).double()
        layer.load_state_dict(
            {**layer.state_dict(), 'weight': torch.from_numpy(scale), 'bias': torch.from_numpy(bias)}
        )
        a = torch.from_numpy(x.astype(np.float64).transpose(0, 3, 1, 2)).requires_grad_()
        y = layer(a)
        y.backward(torch.from_numpy(dy.astype(np.float64).transpose(0, 3, 1, 2)))
        maps = [t.detach().numpy().transpose(0, 2, 3, 1) for t in (y, a.grad)]
        return [
            *maps,
            layer.weight.grad.numpy(),
            layer.bias.grad.numpy(),
            *map(np.asarray, (layer.running_mean, layer.running_var)),
        ]

    params = {'scale': scale, 'bias': bias}

    def split(x: np.ndarray, n: int) -> np.ndarray:
        return x.reshape(n, -1, *x.shape[1:])

    def joined(results: Any, reduce: Any = np.sum) -> list[np.ndarray]:
        """Of several devices or halves: maps side by side, gradients summed, statistics averaged."""
        y, dx, dscale, dbias, mean, var = (np.asarray(r, np.float64) for r in results)
        return [
            *(t.reshape(x.shape) for t in (y, dx)),
            dscale.sum(0),
            dbias.sum(0),
            mean.mean(0),
            var.mean(0),
        ]

    halves = joined(
        zip(*(theirs(*pair) for pair in zip(split(x, 2), split(dy, 2), strict=True)), strict=True)
    )
    four = split(x, 4), split(dy, 4)
    for span, expected in (
        (Span(), theirs(x, dy)),
        (Span(parts=2), halves),
        (Span('batch'), theirs(x, dy)),
        (Span('batch', ((0, 1), (2, 3))), halves),
    ):
        run = batch_norm_and_gradients(span)
        found = joined(run(*four, params)) if span.axis_name else run(x, dy, params)
        for name, a, b in zip(('y', 'dx', 'dscale', 'dbias', 'mean', 'var'), found, expected, strict=True):
            rounded = name == 'dx' and dtype != 'float32'
            tolerance = 1e-2 if rounded else 1e-4 if name in ('dbias', 'mean', 'var') else 2e-3
            error = np.abs(np.asarray(a, np.float64) - b).max()
            assert error <= tolerance * np.abs(b).max(), (name, span, error)


@functools.cache
def batch_norm_and_gradients(span: Span) -> Any:
    """(x, dy, params) -> what the layer gives in training, all gradients, the new statistics."""

    def run(x: Any, dy: Any, params: Any) -> list[Any]:
        stats = {'mean': jnp.zeros(7), 'var': jnp.ones(7)}

        def layer(x: Any, params: Any) -> Any:
            variables = {'params': params, 'batch_stats': stats}
            return BatchNorm(span=span).apply(variables, x, True, mutable=['batch_stats'])

        y, pullback, changed = jax.vjp(layer, x, params, has_aux=True)
        dx, grads = pullback(dy)
        found = changed['batch_stats']
        return [y, dx, grads['scale'], grads['bias'], found['mean'], found['var']]

    return jax.pmap(run, 'batch', in_axes=(0, 0, None)) if span.axis_name else jax.jit(run)


def test_batch_norm_over_devices_is_batch_norm_over_the_whole_batch() -> None:
    x = np.random.default_rng(0).normal(2, 3, (8, 3, 3, 5)).astype(np.float32)
    variables = batch_norm(5)
    expected, stats = batch_norm_in_training(Span())(variables, x)

    def one(part: jax.Array) -> Any:
        return BatchNorm(span=Span('batch')).apply(variables, part, True, mutable=['batch_stats'])

    found, found_stats = jax.jit(jax.vmap(one, axis_name='batch'))(x.reshape(4, 2, 3, 3, 5))
    np.testing.assert_allclose(found.reshape(x.shape), expected, atol=1e-5)
    for key in ('mean', 'var'):
        for device in range(4):
            np.testing.assert_allclose(
                found_stats['batch_stats'][key][device], stats['batch_stats'][key], rtol=1e-5
            )


def test_batch_norm_over_groups_of_devices_and_over_parts_of_one_device() -> None:
    x = np.random.default_rng(0).normal(2, 3, (8, 3, 3, 5)).astype(np.float32)
    variables, alone = batch_norm(5), batch_norm_in_training(Span())
    halves = [alone(variables, part) for part in (x[:4], x[4:])]
    expected = np.concatenate([y for y, _ in halves])

    groups = Span('batch', ((0, 1), (2, 3)))
    y, _ = batch_norm_in_training(groups)(variables, x.reshape(4, 2, 3, 3, 5))
    np.testing.assert_allclose(y.reshape(x.shape), expected, atol=1e-5)

    y, stats = batch_norm_in_training(Span(parts=2))(variables, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for key in ('mean', 'var'):
        means = [np.asarray(stats['batch_stats'][key]) for _, stats in halves]
        np.testing.assert_allclose(stats['batch_stats'][key], np.mean(means, 0), rtol=1e-5)


@pytest.mark.parametrize('span', [dict(parts=2, axis_name='batch'), dict(device_groups=((0,), (1,)))])
def test_spans_that_mean_nothing(span: dict[str, Any]) -> None:
    with pytest.raises(FlaxnetsError, match='must be'):
        Span(**span)


FROZEN = Arch('resnext', (1, 1, 1, 1), 2, 32, deep_stem=True, stem_width=8, planes=8)


def maps_and_logits(model: ResNet, x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    maps = model.forward_maps(x, True)
    return maps, model.forward_head(maps[-1], True)


@pytest.mark.parametrize('frozen', [1, 3, 5])
def test_frozen_stages_compute_as_in_inference_and_have_no_gradient(frozen: int) -> None:
    model = build(FROZEN, 3, frozen_stages=frozen)
    variables = random_variables(model)
    x = random_images(2, 32)

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> Any:
            (maps, logits), changed = model.apply(
                {**variables, 'params': params}, x, mutable=['batch_stats'], method=maps_and_logits
            )
            # The maps too: nets of features only have no classifier, and each frozen map ends the way back.
            # In one program both are rounded alike.
            inferred = model.apply({**variables, 'params': params}, x)
            return sum(jnp.square(y).sum() for y in (*maps, logits)), (logits, inferred, changed)

        return jax.grad(loss, has_aux=True)(params)

    grads, (trained, inferred, changed) = jax.device_get(gradient(variables['params']))
    parts = ['conv1 bn1', 'layer1', 'layer2', 'layer3', 'layer4', 'fc']
    for i, names in enumerate(parts):
        for name in names.split():
            moved = [bool(np.any(g)) for g in jax.tree.leaves(grads[name])]
            assert any(moved) == (i >= frozen), name
            if name in changed['batch_stats']:
                before = jax.tree.leaves(variables['batch_stats'][name])
                after = jax.tree.leaves(changed['batch_stats'][name])
                same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
                assert same == (i < frozen), name
    if frozen == 5:
        np.testing.assert_array_equal(trained, inferred)


@jax.enable_x64(True)  # the programs round differently
def test_drop_block_rate_may_be_traced() -> None:
    model = build(TINY['resnext'], 3, dtype='float64', param_dtype='float64')
    variables = random_variables(model)
    maps = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 64)))

    def gradient(third: Any, rate: Any, remat: bool = False) -> Any:
        net = model.clone(drop_block_rate=rate, remat=remat)

        def loss(third: Any) -> Any:
            both = {**variables, 'params': {**variables['params'], 'layer3': third}}
            rngs = {'dropout': jax.random.key(1)}
            y, _ = net.apply(both, maps, 3, method=stage_in_training, mutable=['batch_stats'], rngs=rngs)
            return jnp.square(y).sum()

        return jax.grad(loss)(third)

    third = variables['params']['layer3']
    fixed, none = (jax.jit(lambda p, rate=rate: gradient(p, rate))(third) for rate in (0.3, 0.0))
    for remat in (False, True):
        traced = jax.jit(partial(gradient, remat=remat))
        for rate, expected in ((0.3, fixed), (0.0, none)):
            for ours, theirs in zip(
                jax.tree.leaves(traced(third, rate)), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    assert not np.allclose(fixed['0']['bn3']['scale'], none['0']['bn3']['scale'], rtol=1e-3)


def test_split_attention_refuses_to_train_on_one_image() -> None:
    model = build(TINY['resnest'])
    variables = abstract_variables(model)

    with pytest.raises(FlaxnetsError, match=r'layer1/0/conv2/bn1.*at least 2 images per device'):
        jax.eval_shape(
            lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats']),
            variables,
            jax.ShapeDtypeStruct((1, 64, 64, 3), 'float32'),
        )


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    x = jnp.ones((4000, 2, 2, 3))
    y = DropPath(0.3).apply({}, x, True, rngs={'dropout': jax.random.key(0)})
    per_sample = y.reshape(4000, -1)
    np.testing.assert_array_equal(per_sample.min(1), per_sample.max(1))
    assert set(np.unique(y).round(4)) == {0, np.float32(1 / 0.7).round(4)}
    assert (per_sample[:, 0] == 0).mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(DropPath(0.3).apply({}, x, False), x)


def test_drop_block_drops_squares_shared_by_the_batch() -> None:
    x = jnp.ones((4, 14, 14, 500))
    y = np.asarray(DropBlock(0.1).apply({}, x, True, rngs={'dropout': jax.random.key(0)}))
    np.testing.assert_array_equal(y[0], y[3])
    dropped = y[0] == 0
    # The seeds' probability by the authors' formula, and what squares around them then cover.
    gamma = 0.1 * 14 * 14 / 9 / (12 * 12)
    inner = dropped[1:-1, 1:-1].mean()
    assert inner == pytest.approx(1 - (1 - gamma) ** 9, rel=0.1)
    assert y.mean() == pytest.approx(1, rel=1e-4)
    # Any dropped pixel lies in a dropped 3x3 square, but for squares that the border cuts.
    padded = np.pad(dropped, ((2, 2), (2, 2), (0, 0)), constant_values=True)
    squares = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1)).all((-1, -2))
    covered = np.lib.stride_tricks.sliding_window_view(squares, (3, 3), axis=(0, 1)).any((-1, -2))
    assert (covered | ~dropped).all()
    np.testing.assert_array_equal(DropBlock(0.1).apply({}, x, False), x)
    z = np.asarray(DropBlock(0.1, groups=2).apply({}, x, True, rngs={'dropout': jax.random.key(0)}))
    first, second = np.split(z == 0, 2)
    assert (first == first[0]).all() and (second == second[0]).all() and (first != second).any()
    np.testing.assert_allclose([z[0].mean(), z[-1].mean()], 1, rtol=1e-5)
    with pytest.raises(FlaxnetsError, match='4 images'):
        DropBlock(0.1, groups=3).apply({}, x, True, rngs={'dropout': jax.random.key(0)})


def test_drop_path_keeps_the_shortcut() -> None:
    """In the simplest net: all kinds join branch and shortcut in the same line."""
    # Rates grow to this at the last block, whose branch is then always dropped: what enters leaves.
    model = build(TINY['resnext'], 0, drop_path_rate=1 - 1e-6)
    variables = random_variables(model)

    @jax.jit
    def run(maps: jax.Array) -> Any:
        _, state = model.apply(
            variables,
            maps,
            4,
            method=stage_in_training,
            mutable=['batch_stats', 'intermediates'],
            capture_intermediates=lambda module, _: isinstance(module, Block),
            rngs={'dropout': jax.random.key(2)},
        )
        return [state['intermediates']['layer4'][i]['__call__'][0] for i in ('0', '1')]

    maps = np.random.default_rng(0).normal(size=(2, 8, 8, 128)).astype(np.float32)
    first, second = run(maps)
    np.testing.assert_array_equal(second, first)
    assert np.any(first)


@pytest.mark.parametrize('kind', TINY)
def test_drop_path_and_drop_block_are_in_every_block_kind(kind: str) -> None:
    """DropPath ends each block, at its depth's rate; DropBlock acts three times, in the last two stages."""
    model = build(TINY[kind], 0, drop_path_rate=0.2, drop_block_rate=0.1)
    shapes = abstract_variables(model)
    acting: dict[tuple[str, ...], list[Any]] = {}

    def note(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, DropBlock | DropPath) and context.method_name == '__call__':
            acting.setdefault(module.path[:2], []).append((type(module), module.rate, args[1]))
        return next_method(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(
            lambda v, x: model.apply(
                v, x, True, mutable=['batch_stats'], rngs={'dropout': jax.random.key(0)}
            ),
            shapes,
            jax.ShapeDtypeStruct((2, 32, 32, 3), 'float32'),
        )
    blocks = [('layer1', '0'), ('layer2', '0'), ('layer3', '0'), ('layer4', '0'), ('layer4', '1')]
    for i, path in enumerate(blocks):
        rate = 0.1 if i >= 2 else 0.0
        assert acting[path] == [(DropBlock, rate, True)] * 3 + [(DropPath, pytest.approx(0.05 * i), True)]
    variables = random_variables(model)

    @jax.jit
    def third(maps: jax.Array, rate: jax.Array) -> Any:
        net, rngs = model.clone(drop_path_rate=0.0, drop_block_rate=rate), {'dropout': jax.random.key(0)}
        return net.apply(variables, maps, 3, method=stage_in_training, mutable=['batch_stats'], rngs=rngs)[0]

    maps = np.random.default_rng(0).normal(size=(2, 8, 8, 64)).astype(np.float32)
    assert not np.allclose(third(maps, 0.2), third(maps, 0.0), atol=1e-2)


def test_dropout_acts_before_the_classifier() -> None:
    model = build(TINY['resnext'], num_classes=10, drop_rate=0.5)
    features = jnp.ones((64, 2, 2, 2048))
    variables = random_variables(model)
    rngs = {'dropout': jax.random.key(1)}
    pooled = model.apply(variables, features, True, pre_logits=True, method='forward_head', rngs=rngs)
    assert (pooled == 0).mean() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(
        model.apply(variables, features, False, pre_logits=True, method='forward_head'), np.ones((64, 2048))
    )


# --- split attention


@pytest.mark.parametrize('radix', [1, 2, 4])
@pytest.mark.parametrize('cardinality', [1, 2, 4])
def test_split_attention_against_a_loop_over_cardinal_groups(radix: int, cardinality: int) -> None:
    """The paper's equations 1 and 2, one cardinal group at a time, with random weights everywhere."""
    features, channels = 16 * cardinality, 8 * cardinality * radix
    rng = np.random.default_rng(radix * 10 + cardinality)
    x = rng.normal(size=(3, 5, 7, channels)).astype(np.float32)
    layer = SplitAttention(features, 1, cardinality, radix, Conv, BatchNorm)
    variables = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, False), x)
    variables = jax.tree.map(lambda leaf: np.abs(rng.normal(size=leaf.shape)).astype(np.float32), variables)
    variables['params'] = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.3, variables['params']
    )
    found = jax.jit(layer.apply, static_argnums=2)(variables, x, False)
    np.testing.assert_allclose(
        found, _naive(variables, x, features, cardinality, radix), rtol=1e-4, atol=1e-4
    )


def _naive(variables: Any, x: np.ndarray, features: int, cardinality: int, radix: int) -> np.ndarray:
    p, s = variables['params'], variables['batch_stats']

    def norm(name: str, y: np.ndarray, channels: slice) -> np.ndarray:
        a, b, m, v = (
            t[channels] for t in (p[name]['scale'], p[name]['bias'], s[name]['mean'], s[name]['var'])
        )
        return np.maximum((y - m) / np.sqrt(v + 1e-5) * a + b, 0)

    n, h, w, channels = x.shape
    each, inputs = features // cardinality, channels // (cardinality * radix)
    inner = p['fc1']['kernel'].shape[-1] // cardinality
    out = np.zeros((n, h, w, features), np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for k in range(cardinality):
        splits = []
        for r in range(radix):
            group = r * cardinality + k  # radix-major
            chosen = slice(group * each, (group + 1) * each)
            kernel = p['conv']['kernel'][..., chosen]
            own = padded[..., group * inputs : (group + 1) * inputs]
            y = sum(own[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))
            splits.append(norm('bn0', y, chosen))
        gap = sum(splits).mean((1, 2))
        a, b = slice(k * inner, (k + 1) * inner), slice(k * radix * each, (k + 1) * radix * each)
        z = gap @ p['fc1']['kernel'][0, 0][:, a] + p['fc1']['bias'][a]
        logits = norm('bn1', z, a) @ p['fc2']['kernel'][0, 0][:, b] + p['fc2']['bias'][b]
        logits = logits.reshape(n, radix, each)
        if radix == 1:
            weights = 1 / (1 + np.exp(-logits))
        else:
            weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        out[..., k * each : (k + 1) * each] = sum(
            splits[r] * weights[:, r][:, None, None] for r in range(radix)
        )
    return out


@pytest.mark.parametrize('width', [50, 300])
def test_splits_that_leave_a_rest_are_refused(width: int) -> None:
    net = build(Arch('resnest', (1, 1, 1, 1), radix=7, base_width=width))
    with pytest.raises(FlaxnetsError, match='must both be divisible by groups=7'):
        jax.eval_shape(partial(net.init, jax.random.key(0)), jnp.ones((1, 32, 32, 3)))
