"""Settings: checked, changed by text, stored, compared, described."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from nets import timm_net

from flaxnets.errors import FlaxnetsError
from train import recipes
from train.__main__ import main
from train.settings import FIELDS as DECLARED
from train.settings import MAY_CHANGE, Settings, apply, difference, from_json, to_json, validate
from train.tools.description import describe

DIGITS = recipes.get('digits')
FIELDS = [field.name for field in dataclasses.fields(Settings)]


def test_the_docs_are_made_of_the_declarations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['fields', '--markdown']) == 0
    docs = Path(__file__).parents[1] / 'docs' / 'settings.md'
    assert docs.read_text('utf-8') == capsys.readouterr().out
    assert main(['fields']) == 0
    text, docstring = capsys.readouterr().out, Settings.__doc__ or ''
    for name, field in DECLARED.items():
        assert re.search(rf'^  {name}\b', text, re.MULTILINE) and f'  {name}: {field.what}.' in docstring
        if name != 'model':  # the defaults are values that are allowed
            assert field.problem(field.default) is None
            assert (
                field.parse(
                    ','.join(map(str, field.default))
                    if isinstance(field.default, tuple)
                    else str(field.default)
                )
                == field.default
            )


@pytest.mark.parametrize(
    ('field', 'value', 'complaint'),
    [
        ('model', str(Path(__file__).parent), 'weights='),
        ('model', 'resnest51d', 'did you mean'),
        ('model', 7, 'model=7 must be text'),
        ('epochs', '3', "epochs='3' must be a whole number"),
        ('epochs', 2.0, 'epochs=2.0 must be a whole number'),
        ('epochs', True, 'epochs=True must be a whole number'),
        ('epochs', 0, 'epochs=0 must be at least 1'),
        ('nesterov', 1, 'nesterov=1 must be true or false'),
        ('lr', 0.0, 'lr=0.0 must be above 0'),
        ('lr', float('nan'), 'lr=nan must be a number'),
        ('lr', float('inf'), 'lr=inf must be a number'),
        ('lr', True, 'lr=True must be a number'),
        ('batch_size', -1, 'batch_size=-1 must be at least 1'),
        ('momentum', 1.0, 'momentum=1.0 must be at least 0 and below 1'),
        ('label_smoothing', -0.1, 'label_smoothing=-0.1 must be at least 0 and below 1'),
        ('ema_decay', 1, 'ema_decay=1 must be at least 0 and below 1'),
        ('layer_decay', 0.0, 'layer_decay=0.0 must be above 0 and at most 1'),
        ('hue', 0.6, 'hue=0.6 must be from 0 to 0.5'),
        ('flip', 1.5, 'flip=1.5 must be from 0 to 1'),
        ('policy_magnitude', 31, 'policy_magnitude=31 must be from 0 to 30'),
        ('frozen_stages', 6, 'frozen_stages=6 must be from 0 to 5'),
        ('seed', 2**31, 'seed=2147483648 must be from 0 to 2147483647'),
        ('in_chans', 0, 'in_chans=0 must be at least 1'),
        ('dtype', 'float16', "dtype='float16' is not one of 'float32', 'bfloat16'"),
        ('policy', 'trivialaugment', "policy='trivialaugment' is not one of "),
        ('schedule', 'linear', "schedule='linear' is not one of 'cosine', 'step', 'constant'"),
        ('decay', 'none', "decay='none' is not one of 'all', 'kernels', 'encoding'"),
        ('crop_area', (0.5, 0.2), 'crop_area=(0.5, 0.2) must be'),
        ('crop_area', (0.0, 1.0), 'crop_area=(0.0, 1.0) must be'),
        ('crop_area', (0.5, 1.2), 'crop_area=(0.5, 1.2) must be'),
        ('crop_ratio', (2.0, 1.0), 'crop_ratio=(2.0, 1.0) must be'),
        ('crop_ratio', (1.0,), 'crop_ratio=(1.0,) must be two numbers'),
        ('image_size', (224, 0), 'image_size=(224, 0) must be at least 1'),
        ('eval_size', -1, 'eval_size=-1 must be at least 1'),
        ('std', (0.0,), 'std=(0.0,) must be above 0'),
    ],
)
def test_bad_values_are_named(field: str, value: Any, complaint: str) -> None:
    with pytest.raises(FlaxnetsError, match=re.escape(complaint)):
        validate(dataclasses.replace(DIGITS, **{field: value}))


@pytest.mark.parametrize(
    ('changes', 'complaint'),
    [
        (dict(accumulation=7), 'batch_size=64 must be a multiple of accumulation=7'),
        (dict(bn_images=48), 'batch_size=64 must be a multiple of bn_images=48'),
        (dict(bn_images=128), 'batch_size=64 must be a multiple of bn_images=128'),
        (dict(mix_images=48), 'batch_size=64 must be a multiple of mix_images=48'),
        (dict(warmup_epochs=25), 'warmup_epochs=25 must be fewer than epochs=25'),
        (dict(mix_off_epochs=26), 'mix_off_epochs=26 must not be more than epochs=25'),
        (dict(momentum=0.0), 'nesterov=True needs a momentum above 0'),
        (dict(crop_padding=0), "crop='pad' needs a crop_padding"),
        (dict(frozen_stages=2), 'give weights to start from'),
        (dict(freeze_bn=True), 'freeze_bn=True would keep statistics'),
        (dict(mixup=0.2, mix_images=1), 'mix_images=1 mixes each image with itself'),
        (dict(mean=(0.5, 0.5)), 'mean=(0.5, 0.5) must be one number, or one for each'),
        (dict(in_chans=2, jitter=0.4), 'in_chans=2 needs jitter=0.0'),
        (dict(mean=(127.0,), std=(58.0,)), 'std=(58.0,) is of values from 0 to 255'),
    ],
)
def test_bad_combinations_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FlaxnetsError, match=re.escape(complaint)):
        validate(dataclasses.replace(DIGITS, **changes))


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(FlaxnetsError) as caught:
        validate(dataclasses.replace(DIGITS, lr=-1.0, epochs='x', crop='none', model='nothing'))
    assert len(str(caught.value).splitlines()) == 5


def test_values_at_the_bounds_are_good() -> None:
    validate(dataclasses.replace(DIGITS, flip=1.0, hue=0.5, layer_decay=1.0, crop_area=(1.0, 1.0), lr=1))
    validate(dataclasses.replace(DIGITS, epochs=1, seed=2**31 - 1, keep_best=0, frozen_stages=5, weights='x'))


@pytest.mark.parametrize(
    ('change', 'field', 'value'),
    [
        ('lr=0.2', 'lr', 0.2),
        ('lr=1', 'lr', 1.0),
        ('weight_decay=1e-4', 'weight_decay', 1e-4),
        ('epochs=300', 'epochs', 300),
        ('crop_area=0.25,1', 'crop_area', (0.25, 1.0)),
        ('crop_ratio=3/4,4/3', 'crop_ratio', (3 / 4, 4 / 3)),
        ('crop_ratio=(0.5, 2)', 'crop_ratio', (0.5, 2.0)),
        ('nesterov=false', 'nesterov', False),
        ('nesterov=0', 'nesterov', False),
        ('remat=Yes', 'remat', True),
        ('data=folder:a=b', 'data', 'folder:a=b'),
        ('policy=', 'policy', ''),
        ('eval_size=256', 'eval_size', 256),
        ('eval_size=224,320', 'eval_size', (224, 320)),
        ('mean=0.5', 'mean', (0.5,)),
        ('std=1/2,0.25,1', 'std', (0.5, 0.25, 1.0)),
        ('mean=', 'mean', ()),
    ],
)
def test_a_change_is_read_as_its_field_is(change: str, field: str, value: Any) -> None:
    changed = apply(DIGITS, [change])
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    assert changed == dataclasses.replace(DIGITS, **{field: value})
    if field not in MAY_CHANGE and getattr(DIGITS, field) != value:
        assert difference(DIGITS, changed) == [f'{field}: {getattr(DIGITS, field)!r} -> {value!r}']


@pytest.mark.parametrize(
    ('change', 'complaint'),
    [
        ('learning_rate=0.1', "'learning_rate' is not a field: did you mean lr?"),
        ('--lr=0.1', "'--lr' is not a field: did you mean lr?"),
        ('batch-size=3', "'batch-size' is not a field: did you mean batch_size"),
        ('nestrov=1', 'did you mean nesterov?'),
        ('img-size=96', 'did you mean image_size?'),
        ('qqq=1', 'the fields are model, weights, '),
        ('lr', "'lr' is not of the form field=value"),
        ('lr=fast', "lr='fast' must be a number"),
        ('lr=nan', "lr='nan' must be a number"),
        ('lr=inf', "lr='inf' must be a number"),
        ('lr=1/0', "lr='1/0' must be a number"),
        ('lr=', "lr='' must be a number"),
        ('epochs=2.5', "epochs='2.5' must be a whole number"),
        ('remat=maybe', "remat='maybe' must be true or false"),
        ('crop_area=1', "crop_area='1' must be two numbers, as in 0.25,1"),
        ('crop_area=0.1,0.2,0.3', 'must be two numbers'),
        ('image_size=1,2,3', "image_size='1,2,3' must be a whole number, or two"),
        ('image_size=', "image_size='' must be a whole number, or two"),
        ('std=a', "std='a' must be one number, or one for each channel"),
    ],
)
def test_a_change_that_is_none(change: str, complaint: str) -> None:
    with pytest.raises(FlaxnetsError, match=re.escape(complaint)):
        apply(DIGITS, ['seed=1', change])


def test_the_last_of_two_changes_counts_and_all_bad_ones_are_named() -> None:
    assert apply(DIGITS, ['lr=1', 'lr=2']).lr == 2
    with pytest.raises(FlaxnetsError) as caught:
        apply(DIGITS, ['lr=x', 'zz=1', 'seed'])
    assert len(str(caught.value).splitlines()) == 4


def test_weights_and_model_stay_together() -> None:
    finetune = recipes.get('finetune')
    assert apply(finetune, ['model=res2net50d']).weights == 'res2net50d'
    assert apply(finetune, ['weights=resnest101']).model == 'resnest101e'
    both = apply(finetune, ['weights=last.pth', 'model=res2next50'])
    assert (both.model, both.weights) == ('res2next50', 'last.pth')
    assert apply(finetune, ['weights=last.pth']).model == finetune.model
    assert apply(recipes.get('resnest50d'), ['model=resnest101e']).weights == ''


@pytest.mark.parametrize('name', recipes.RECIPES)
def test_json_and_back(name: str) -> None:
    settings = recipes.RECIPES[name]
    assert from_json(json.loads(json.dumps(to_json(settings)))) == settings


def test_json_of_other_versions() -> None:
    data = to_json(DIGITS)
    del data['clip_norm']
    assert from_json(data) == DIGITS  # as written before there was such a field
    with pytest.raises(FlaxnetsError, match='sharpness=3'):
        from_json({**data, 'sharpness': 3})
    with pytest.raises(FlaxnetsError, match="lr='0.1'"):
        from_json({**data, 'lr': '0.1'})
    with pytest.raises(FlaxnetsError, match='no model'):
        from_json({})


def test_a_resumed_run_may_change_how_it_is_watched_and_no_more() -> None:
    assert set(FIELDS) >= MAY_CHANGE
    changed = apply(
        DIGITS, ['workers=3', 'log_steps=7', 'keep_last=9', 'data=folder:x', 'max_steps=5', 'eval_epochs=2']
    )
    assert difference(DIGITS, changed) == []
    changed = dataclasses.replace(changed, lr=0.2, crop_area=(0.2, 1.0))
    assert difference(DIGITS, changed) == ['crop_area: (0.08, 1.0) -> (0.2, 1.0)', 'lr: 0.1 -> 0.2']
    # All that decides which numbers come out.
    assert not MAY_CHANGE & {'model', 'seed', 'batch_size', 'accumulation', 'bn_images', 'epochs', 'weights'}
    assert not MAY_CHANGE & {'dtype', 'remat', 'image_size', 'num_classes', 'train_split', 'decay'}


def test_description_of_the_authors_run() -> None:
    text = describe(recipes.get('resnest50d'), 1281167, 16)
    lines = {' '.join(line.split()) for line in text.splitlines()}
    assert {
        '* lr 3.2',
        '* nesterov True',
        '* policy resnest_autoaugment',
        'schedule cosine',
        "weights ''",
        'crop_area 0.08,1',
        'global batch 8192 images: 512 on each of 16 devices',
        'an epoch 156 steps, 1277952 of 1281167 images',
        'the run 42120 steps, 270 epochs',
        'BatchNorm over 128 images, on each device',
        'learning rate 0 at step 0 (first step), DropBlock 0.0003704',
        'learning rate 3.2 at step 780 (end of warm-up), DropBlock 0.002222',
        'learning rate 1.64741 at step 21060 (middle), DropBlock 0.05037',
    } <= lines
    assert all(re.search(rf'^[ *] {field} ', text, re.MULTILINE) for field in FIELDS)
    parameters = list(timm_net('resnest50d').parameters())
    everything = sum(p.numel() for p in parameters)
    kernels = [p.numel() for p in parameters if p.ndim > 1]
    assert f'parameters {everything:,} in {len(parameters)} arrays' in ' '.join(text.split())
    assert f'weight decay 0.0001 on {sum(kernels):,} in {len(kernels)} arrays' in lines


def test_description_of_frozen_parts_and_shared_statistics() -> None:
    settings = apply(
        recipes.get('finetune'), ['frozen_stages=5', 'num_classes=10', 'accumulation=2', 'bn_images=16']
    )
    text = ' '.join(describe(settings, 8000, 4).split())
    assert 'global batch 64 images: 16 on each of 4 devices, in 2 parts of 8' in text
    assert 'BatchNorm over 16 images, over 2 devices' in text
    assert 'trained 20,490 in 2 arrays' in text  # 2048 * 10 + 10
    assert 'weight decay 0.0001 on 20,480 in 1 arrays' in text


def test_description_of_what_cannot_be_run() -> None:
    with pytest.raises(FlaxnetsError, match='batch_size=64 cannot be shared by 5 devices'):
        describe(DIGITS, 1437, 5)
    with pytest.raises(FlaxnetsError, match='lr=0'):
        describe(dataclasses.replace(DIGITS, lr=0.0), 1437, 1)
