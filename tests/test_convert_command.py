"""python -m convert: every kind of source and target, and the work it does on the way."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from nets import randomise, timm_net

import flaxnets
from convert.__main__ import DIFFERENT, main
from convert.conversion import open_checkpoint
from convert.names.layouts_back import from_canonical
from flaxnets import zoo
from flaxnets.store import weights

State = dict[str, torch.Tensor]
NET, PUBLISHED = 'resnest_tiny', 'resnest14d'
KINDS = ['seresnext50_32x4d', 'res2net_tiny', NET, PUBLISHED]


def state_of(name: str, **kwargs: Any) -> State:
    return dict(randomise(timm_net(name, **kwargs)).state_dict())


@pytest.fixture(scope='module')
def states() -> dict[str, State]:
    return {name: state_of(name) for name in KINDS}


@pytest.fixture
def state(states: dict[str, State]) -> State:
    return states[NET]


@pytest.fixture
def published(states: dict[str, State]) -> State:
    return states[PUBLISHED]


@pytest.fixture
def file(tmp_path: Path, state: State) -> Path:
    torch.save(state, tmp_path / 'net.pth')
    return tmp_path / 'net.pth'


def run(*arguments: object, code: int = 0) -> None:
    assert main([str(a) for a in arguments]) == code


# --- one net in every layout and format


def prefixed(prefix: str) -> Callable[[str, State], Any]:
    return lambda _, state: {prefix + key: t for key, t in state.items()}


def timm_training_file(name: str, state: State) -> Any:
    return {
        'epoch': 3,
        'arch': name,
        'optimizer': {'state': {}, 'param_groups': [{'lr': 0.1}]},
        'version': 2,
        'args': argparse.Namespace(model=name, lr=0.1),
        'state_dict': {key: torch.zeros_like(t) for key, t in state.items()},
        'state_dict_ema': state,
        'metric': 12.5,
    }


def mmpretrain_file(name: str, state: State) -> Any:
    arrays = {key: t.numpy() for key, t in state.items()}
    renamed = from_canonical(arrays, 'mmpretrain', zoo.NETS[name])
    return {'meta': {'epoch': 1}, 'state_dict': {key: torch.from_numpy(a) for key, a in renamed.items()}}


LAYOUTS: dict[str, Callable[[str, State], Any]] = {
    'bare': lambda _, state: state,
    'without counters': lambda _, s: {k: t for k, t in s.items() if not k.endswith('num_batches_tracked')},
    'DataParallel': lambda _, s: {'epoch': 1, 'state_dict': prefixed('module.')('', s), 'best_prec1': 1.0},
    'torch.compile': prefixed('_orig_mod.'),
    'both': prefixed('module._orig_mod.'),
    'timm training': timm_training_file,
    'mmpretrain': mmpretrain_file,
}


def save_zip(content: Any, folder: Path) -> Path:
    torch.save(content, folder / 'zip.pth')
    return folder / 'zip.pth'


def save_legacy(content: Any, folder: Path) -> Path:
    torch.save(content, folder / 'legacy.pth.tar', _use_new_zipfile_serialization=False)
    return folder / 'legacy.pth.tar'


def save_safetensors(content: Any, folder: Path) -> Path | None:
    flat = content.get('state_dict_ema', content.get('state_dict', content))
    safetensors.torch.save_file({k: t.contiguous() for k, t in flat.items()}, folder / 'x.safetensors')
    return folder / 'x.safetensors'


FORMATS = (save_zip, save_legacy, save_safetensors)
COMBINATIONS = [(NET, save, layout) for save in FORMATS for layout in LAYOUTS]
COMBINATIONS += [(name, save_zip, layout) for name in KINDS[:2] for layout in ('bare', 'mmpretrain')]


@pytest.mark.parametrize(('name', 'save', 'layout'), COMBINATIONS)
def test_every_layout_in_every_format_is_one_tree(
    name: str, save: Callable[[Any, Path], Path], layout: str, states: dict[str, State], tmp_path: Path
) -> None:
    path = save(LAYOUTS[layout](name, states[name]), tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.name == name
    expected = {k: t for k, t in states[name].items() if not k.endswith('num_batches_tracked')}
    found = {k: t for k, t in checkpoint.state.items() if not k.endswith('num_batches_tracked')}
    assert set(found) == set(expected)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    _ = checkpoint.variables


def test_a_hugging_face_folder(published: State, tmp_path: Path) -> None:
    folder = tmp_path / 'hub'
    timm.models.save_for_hf(timm_loaded(published), folder)
    run(folder, '--out', tmp_path / 'net', '--verify')
    assert open_checkpoint(folder).config.preprocess == zoo.config('resnest14d').preprocess
    run('--compare', folder, tmp_path / 'net')


def test_a_hugging_face_folder_of_another_net(
    published: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / 'hub'
    net = timm.create_model('resnest14d', global_pool='max')
    net.load_state_dict(published)
    timm.models.save_for_hf(net, folder)
    run(folder, '--out', tmp_path / 'net', code=1)
    assert "builds its net with global_pool='max'" in capsys.readouterr().err
    run(folder, '--out', tmp_path / 'net', '--approximate')
    assert "give global_pool='max' to flaxnets.load" in capsys.readouterr().out
    ours, variables = flaxnets.load(tmp_path / 'net', global_pool='max')
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = net.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(
        jax.jit(ours.apply)(variables, images), expected, atol=1e-4 * np.abs(expected).max()
    )

    config = json.loads((folder / 'config.json').read_text())
    config |= {'num_classes': 10, 'global_pool': 'avg', 'model_args': {}}
    (folder / 'config.json').write_text(json.dumps(config))
    run(folder, '--out', tmp_path / 'other', code=1)
    assert 'config.json says 10 classes and 3 input channels' in capsys.readouterr().err


def timm_loaded(state: State) -> torch.nn.Module:
    net = timm.create_model('resnest14d')
    net.load_state_dict(state)
    return net


# --- back to PyTorch


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_back_to_a_file(file: Path, state: State, suffix: str) -> None:
    directory, back = file.with_name('net'), file.with_name('back' + suffix)
    run(file, '--out', directory)
    run(directory, '--out', back)
    loaded = torch.load(back) if suffix == '.pth' else safetensors.torch.load_file(back)
    assert set(loaded) == set(state)
    assert all(
        torch.equal(loaded[key], state[key]) and loaded[key].dtype == state[key].dtype for key in state
    )
    timm.models.load_checkpoint(timm_net(NET), str(back))
    if suffix == '.safetensors':
        with safetensors.safe_open(back, 'pt') as opened:
            assert opened.metadata() == {'format': 'pt'}  # transformers insists on it
    certificate = json.loads(back.with_name(back.name + '.json').read_text())
    assert certificate['source']['file'] == 'net.pth'
    assert set(certificate['arrays']) == set(state)


def test_a_layout_whose_net_computes_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = state_of('resnest50d_1s4x24d')
    torch.save(state, tmp_path / 'net.pth')
    out = tmp_path / 'mm.pth'
    arguments = [str(tmp_path / 'net.pth'), '--out', str(out), '--layout', 'mmpretrain']
    assert main(arguments) == 1
    assert 'pools after its split attention' in capsys.readouterr().err and not out.exists()
    assert main([*arguments, '--approximate']) == 0
    assert "mmpretrain's ResNeSt pools after" in capsys.readouterr().out
    assert 'pools after' in json.loads((tmp_path / 'mm.pth.json').read_text())['source']['notes'][-1]


def test_mmpretrain_and_back(file: Path, state: State) -> None:
    mm = file.with_name('mm.pth')
    run(file, '--out', mm, '--layout', 'mmpretrain')
    keys = set(torch.load(mm))
    assert {'backbone.stem.0.conv.weight', 'backbone.layer1.0.downsample.0.weight', 'head.fc.weight'} <= keys
    run('--compare', mm, file)


def test_torchvision_takes_plain_resnexts_only(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state_of('resnext50_32x4d'), tmp_path / 'x.pth')
    run(tmp_path / 'x.pth', '--out', tmp_path / 'tv.pth', '--layout', 'torchvision')
    from torchvision.models import resnext50_32x4d

    resnext50_32x4d().load_state_dict(torch.load(tmp_path / 'tv.pth'), strict=True)
    monkeypatch.delattr('convert.__main__.verify')  # it is refused before that work
    run(file, '--out', tmp_path / 'no.pth', '--layout', 'torchvision', '--verify', code=1)
    assert 'torchvision has plain ResNeXts only' in capsys.readouterr().err
    assert not (tmp_path / 'no.pth').exists()


def test_a_certificate_is_not_overwritten_unasked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, beside = file.with_name('back.pth'), file.with_name('back.pth.json')
    beside.write_text('mine')
    run(file, '--out', out, code=1)
    assert f'{beside} exists' in capsys.readouterr().err
    assert beside.read_text() == 'mine' and not out.exists()
    run(file, '--out', out, '--force')
    assert 'sha256' in beside.read_text() and out.exists()
    beside.unlink()
    beside.mkdir()
    before = out.read_bytes()
    run(file, '--out', out, '--force', code=1)
    assert f'{beside} is a directory' in capsys.readouterr().err and out.read_bytes() == before


# --- work on the way


def test_verify_is_printed_and_certified(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, '--out', file.with_name('net'), '--verify')
    output = capsys.readouterr().out
    for words in ('timm 1.0', 'layer1.0', 'layer4.0', 'fc', 'all within tolerance'):
        assert words in output
    certificate = json.loads((file.with_name('net') / 'certificate.json').read_text())
    assert certificate['verification']['within'] is True
    assert len(certificate['verification']['layers']) == 6


def test_no_ema_takes_the_other_weights(state: State, tmp_path: Path) -> None:
    content = timm_training_file(NET, state)
    content['state_dict'] = {k: t + 1 if t.is_floating_point() else t for k, t in state.items()}
    torch.save(content, tmp_path / 'last.pth.tar')
    run(tmp_path / 'last.pth.tar', '--out', tmp_path / 'trained', '--no-ema')
    found = open_checkpoint(tmp_path / 'trained').state
    np.testing.assert_array_equal(found['fc.bias'], state['fc.bias'].numpy() + 1)
    assert any('state_dict' in note for note in weights.read_source(tmp_path / 'trained').notes)


def test_folded_directories_load_and_give_the_same_logits(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, folded = file.with_name('plain'), file.with_name('folded')
    run(file, '--out', plain)
    run(file, '--out', folded, '--fold-bn', '--verify')
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    logits = []
    for directory in (plain, folded):
        model, variables = flaxnets.load(directory)
        logits.append(np.asarray(jax.jit(model.apply)(variables, images)))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4 * np.abs(logits[0]).max()
    assert 'batch_stats' not in variables
    run(folded, '--out', file.with_name('back.pth'), code=1)
    assert 'no PyTorch net takes them' in capsys.readouterr().err
    run(folded, '--out', file.with_name('again'), '--fold-bn', code=1)
    assert 'folded already' in capsys.readouterr().err


def test_drop_head_and_dtype(file: Path) -> None:
    # Verified with the numbers as rounded: what they lost is not the conversion's.
    run(file, '--out', file.with_name('net'), '--drop-head', '--dtype', 'bfloat16', '--verify')
    model, variables = flaxnets.load(file.with_name('net'))
    assert model.num_classes == 0 and 'fc' not in variables['params']
    stored = weights.read_variables(file.with_name('net'))
    assert stored['params']['conv1']['0']['kernel'].dtype.name == 'bfloat16'
    assert stored['batch_stats']['bn1']['mean'].dtype.name == 'float32'


def test_average(state: State, tmp_path: Path) -> None:
    for i in range(3):
        shifted = {k: t + i if t.is_floating_point() else t for k, t in state.items()}
        torch.save(shifted, tmp_path / f'{i}.pth')
    run('--average', *(tmp_path / f'{i}.pth' for i in range(3)), '--out', tmp_path / 'mean')
    found = open_checkpoint(tmp_path / 'mean').state
    np.testing.assert_allclose(found['fc.weight'], state['fc.weight'] + 1, rtol=1e-6)
    assert weights.read_source(tmp_path / 'mean').notes == ('the mean of 0.pth, 1.pth, 2.pth',)


def test_compare_names_the_blocks_that_differ(
    file: Path, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    run('--compare', file, file)
    assert capsys.readouterr().out.endswith('equal\n')
    other = dict(state)
    other['layer3.0.bn3.bias'] = state['layer3.0.bn3.bias'] + 0.5
    del other['fc.bias'], other['fc.weight']
    torch.save(other, file.with_name('other.pth'))
    run('--compare', file, file.with_name('other.pth'), code=DIFFERENT)
    output = capsys.readouterr().out
    assert 'only in the first: fc.bias' in output
    line = next(line for line in output.splitlines() if line.strip().startswith('layer3.0'))
    assert line.split()[1:4] == ['1', 'of', '33'] and '5.00e-01' in line
    assert 'layer2.0' not in output and output.endswith('DIFFERENT\n')


# --- recognition


def test_two_nets_of_equal_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are told apart by what is asked for or by a file's name, and are neither equal nor averaged."""
    file, twins = tmp_path / 'net.pth', ('resnest50d', 'resnest50_fast_2s1x64d')
    torch.save(state_of(twins[0], num_classes=3), file)
    run(file, '--out', tmp_path / 'a', code=1)
    error = capsys.readouterr().err
    assert all(name in error for name in twins) and '--model' in error
    for name in twins:
        run(file, '--out', tmp_path / name, '--model', name)
        assert weights.read_config(tmp_path / name).name == name
        named = file.rename(tmp_path / f'my_{name}_v2.pth')
        assert open_checkpoint(named).config.name == name
        file = named.rename(file)
    both = [tmp_path / name for name in twins]
    capsys.readouterr()
    run('--compare', *both, code=DIFFERENT)
    output = capsys.readouterr().out
    assert 'different nets: resnest50d and resnest50_fast_2s1x64d' in output
    assert output.endswith('DIFFERENT\n')
    run('--average', *both, '--out', tmp_path / 'mean', code=1)
    assert 'cannot average different nets' in capsys.readouterr().err


def test_other_heads_and_channels_are_recognised(tmp_path: Path) -> None:
    torch.save(state_of(NET, num_classes=5, in_chans=4), tmp_path / 'net.pth')
    run(tmp_path / 'net.pth', '--out', tmp_path / 'net', '--verify')
    config = weights.read_config(tmp_path / 'net')
    assert (config.name, config.num_classes, config.in_chans) == (NET, 5, 4)


def test_another_net_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model('resnet50').state_dict(), tmp_path / 'net.pth')
    run(tmp_path / 'net.pth', '--out', tmp_path / 'net', code=1)
    assert 'nearest' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ['net.pth']


@pytest.mark.parametrize(
    'arguments',
    [
        [],
        ['a', '--compare', 'b', 'c'],
        ['a', '--out', 'b', '--image', 'c'],
        ['a', '--dtype', 'int8'],
        ['--compare', 'a', 'b', '--out', 'c'],
        ['--compare', 'a', 'b', '--drop-head'],
    ],
)
def test_wrong_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2 and 'error:' in capsys.readouterr().err


def test_out_is_asked_for(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, code=1)
    assert '--out is missing' in capsys.readouterr().err


def test_layouts_are_for_files(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, '--out', file.with_name('net'), '--layout', 'mmpretrain', code=1)
    assert '--layout mmpretrain is for files' in capsys.readouterr().err
    assert not file.with_name('net').exists()


OWN = (224, 0.875, 'bilinear', 0.485, 0.229)


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ({}, OWN),
        (
            dict(img_size=160, crop_pct=1.0, interpolation='bicubic', mean=[0.5], std=[0.5, 0.5, 0.5]),
            (160, 1.0, 'bicubic', 0.5, 0.5),
        ),
        (dict(img_size=None, input_size=[3, 96, 96], mean=None, std=[0, 0, 0]), (96, *OWN[1:])),
        (dict(val_resize_size=256, val_crop_size=192), (192, 0.75, *OWN[2:])),
        (dict(img_size='a', crop_pct=7, interpolation='random', mean='x'), (224, 7.0, *OWN[2:])),
        (dict(img_size=torch.ones(2), interpolation=torch.ones(2), gp=torch.ones(2)), OWN),
        (dict(mean=[float('nan')] * 3, std=[1.0, float('inf'), 1.0], input_size=[3, torch.ones(2), 1]), OWN),
    ],
    ids=['nothing', 'timm', 'input_size', 'torchvision', 'nonsense', 'tensors', 'not finite'],
)
def test_images_are_prepared_as_the_training_evaluated_them(
    arguments: dict[str, Any], expected: tuple[Any, ...], published: State, tmp_path: Path
) -> None:
    saved = {'arch': 'resnest14d', 'args': argparse.Namespace(**arguments), 'state_dict': published}
    torch.save(saved, tmp_path / 'net.pth')
    checkpoint = open_checkpoint(tmp_path / 'net.pth')
    p = checkpoint.config.preprocess
    assert (p.size, p.crop_pct, p.interpolation, p.mean[0], p.std[0]) == expected
    note = next(note for note in checkpoint.source.notes if note.startswith('images: '))
    known = expected != OWN
    assert f'{p.size} px' in note and ("as the file's training" in note) == known
    assert 'resnest14d.gluon_in1k' in note


def test_a_training_that_pooled_otherwise_is_refused(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({'state_dict': state, 'args': argparse.Namespace(gp='catavgmax')}, tmp_path / 'net.pth')
    run(tmp_path / 'net.pth', '--out', tmp_path / 'net', code=1)
    assert "global_pool='catavgmax'" in capsys.readouterr().err


def test_no_file_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / 'pipe.pth')
    run(tmp_path / 'pipe.pth', '--out', tmp_path / 'net', code=1)
    assert 'is a device or pipe' in capsys.readouterr().err
    run('/proc/self/mem', '--out', tmp_path / 'net', code=1)
    assert capsys.readouterr().err.startswith('error: /proc/self/mem: ')


@pytest.mark.parametrize('start', [b'PK', b'\x80\x02'])
def test_a_safetensors_file_whatever_its_first_bytes(start: bytes, state: State, tmp_path: Path) -> None:
    path = tmp_path / 'x.safetensors'
    safetensors.torch.save_file(state, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    padded = length + (int.from_bytes(start, 'little') - length) % 65536
    header = content[8 : 8 + length] + b' ' * (padded - length)
    path.write_bytes(padded.to_bytes(8, 'little') + header + content[8 + length :])
    assert path.read_bytes()[:2] == start
    assert set(open_checkpoint(path).state) == set(state) == set(safetensors.torch.load_file(path))


def test_tar_is_no_file_of_torchs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, '--out', file.with_name('net.tar'), code=1)
    assert '.pth.tar' in capsys.readouterr().err and not file.with_name('net.tar').exists()
    run(file, '--out', file.with_name('net.pth.tar'))
    assert set(torch.load(file.with_name('net.pth.tar'))) == set(open_checkpoint(file).state)


def test_choices_can_be_typed(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {k: t + 1 if t.is_floating_point() else t for k, t in state.items()}
    torch.save({'a': state, "it's b": other}, tmp_path / 'own.pth')
    run(tmp_path / 'own.pth', '--out', tmp_path / 'net', code=1)
    error = capsys.readouterr().err
    typed = [shlex.split(choice) for choice in error.rpartition('taken by ')[2].split(', ')]
    assert typed == [['--key', 'a'], ['--key', "it's b"]]
    run(tmp_path / 'own.pth', '--out', tmp_path / 'net', *typed[1])
    assert np.array_equal(open_checkpoint(tmp_path / 'net').state['fc.bias'], other['fc.bias'].numpy())


def test_no_ema_is_true(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {k: t + 1 if t.is_floating_point() else t for k, t in state.items()}
    path = tmp_path / 'own.pth'
    torch.save({'model_state_dict': state, 'ema_state_dict': other}, path)
    for options, expected in (((), other), (('--no-ema',), state)):
        run(path, '--out', tmp_path / 'net', '--force', *options)
        assert ('--no-ema takes that' in capsys.readouterr().out) is (not options)
        found = open_checkpoint(tmp_path / 'net').state['fc.bias']
        assert np.array_equal(found, expected['fc.bias'].numpy())
    torch.save({'ema_state_dict': other}, path)
    run(path, '--out', tmp_path / 'x', '--no-ema', code=1)
    assert 'averaged weights only (ema_state_dict), and --no-ema' in capsys.readouterr().err
