"""The wheel, installed by itself, as those have it who do not work in a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Every command, in one process, far from the checkout; what it opens has to be in the wheel.
PROGRAM = """
import sys
from pathlib import Path

import flaxnets, convert, train
from flaxnets.__main__ import main
from flaxnets.zoo.benchmarks import published

installed = Path(sys.argv[1])
assert all(installed in Path(module.__file__).parents for module in (flaxnets, convert, train))
assert published('resnest50d.in1k', 'imagenet-a').top1 == 17.36
for arguments in (
    ['list', '--weights'],
    ['info', 'resnest50d'],
    ['recipes'],
    ['train', '--recipe', 'digits', '--print'],
    ['train', '--workdir', 'run', 'max_steps=1', 'model=resnext_tiny', 'batch_size=8', 'bn_images=8'],
    ['convert', 'run/weights', '--out', 'net.pth'],
    ['convert', 'net.pth', '--model', 'resnext_tiny', '--out', 'net'],
    ['evaluate', '--model', 'net', '--data', 'digits', '--quiet'],
    ['predict', 'digit.png', '--model', 'net'],
    ['embed', 'digit.png', '--model', 'net', '--out', 'features.npy'],
    ['explain', 'digit.png', '--model', 'net', '--stage', '2'],
    ['export', 'net', '--out', 'net.stablehlo'],
    ['push', 'net', 'me/net', '--folder', 'hub'],
):
    assert main(arguments) == 0, arguments
"""


@pytest.fixture(scope='module')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
    build = ['wheel', str(ROOT), '--no-deps', '--no-build-isolation', '--wheel-dir', str(folder)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob('flaxnets-*.whl')
    target = folder / 'installed'
    subprocess.run([*pip, 'install', '--no-deps', '--target', str(target), str(wheel)], check=True)
    return target


def test_every_command_works_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new('L', (32, 32), 128).save(tmp_path / 'digit.png')
    environment = {**os.environ, 'PYTHONPATH': str(installed), 'JAX_NUM_CPU_DEVICES': '1'}
    command = [sys.executable, '-c', PROGRAM, str(installed)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {'net', 'net.pth', 'features.npy', 'net.stablehlo', 'hub'} <= {p.name for p in tmp_path.iterdir()}
