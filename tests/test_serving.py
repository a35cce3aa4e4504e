"""The server in examples/, and the code in docs/serving.md: without flaxnets, the answers are timm's."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import randomise, timm_net, to_flax
from PIL import Image
from skimage import data as photographs
from timm.data import create_transform

from flaxnets.exporting.files import export
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from flaxnets.zoo import NETS
from flaxnets.zoo.records import Config

ROOT = Path(__file__).parents[1]
CLASSES = ('ant', 'bee', 'cat', 'dog', 'élan', 'fox')
NET = 'resnext_tiny'
# No flaxnets there: whoever imports it fails.
WITHOUT = "import runpy, sys; sys.modules['flaxnets'] = None; sys.argv = sys.argv[1:]; {}"


@pytest.fixture(scope='module')
def reference() -> torch.nn.Module:
    return randomise(timm_net(NET, num_classes=len(CLASSES)))


@pytest.fixture(scope='module')
def folder(reference: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With net.stablehlo, net.onnx and photo.jpg."""
    path = tmp_path_factory.mktemp('served')
    arch = NETS[NET]
    config = Config(
        NET, arch, Preprocess(32, 0.9, interpolation='bicubic'), num_classes=len(CLASSES), classes=CLASSES
    )
    weights.save(path / 'weights', to_flax(reference, build(arch, len(CLASSES))), config)
    for name in ('net.stablehlo', 'net.onnx'):
        export(path / 'weights', path / name)
    Image.fromarray(photographs.chelsea()).save(path / 'photo.jpg')
    return path


@pytest.fixture(scope='module')
def expected(folder: Path, reference: torch.nn.Module) -> np.ndarray:
    transform = create_transform((3, 32, 32), interpolation='bicubic', crop_pct=0.9)
    with torch.no_grad():
        found: np.ndarray = reference(transform(Image.open(folder / 'photo.jpg'))[None])[0].numpy()
    return found


def without_flaxnets(code: str, *arguments: object) -> list[str]:
    return [sys.executable, '-c', WITHOUT.format(code), *map(str, arguments)]


@pytest.fixture(scope='module')
def url(folder: Path) -> Iterator[str]:
    program = ROOT / 'examples' / 'serve.py'
    run = without_flaxnets(
        "runpy.run_path(sys.argv[0], run_name='__main__')", program, folder / 'net.stablehlo', '--port', 0
    )
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        process.terminate()


def asked(url: str, content: bytes | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, content), timeout=60) as response:
        return json.load(response)


def test_the_server_answers_with_top5(url: str, folder: Path, expected: np.ndarray) -> None:
    top = asked(url, (folder / 'photo.jpg').read_bytes())['top']
    shares = np.exp(expected - expected.max()) / np.exp(expected - expected.max()).sum()
    best = np.argsort(-shares)[:5]
    assert [guess['class'] for guess in top] == [CLASSES[i] for i in best]
    np.testing.assert_allclose([guess['probability'] for guess in top], shares[best], atol=1e-5)
    assert asked(url)['classes'] == list(CLASSES)


def test_the_server_refuses_what_is_no_picture(url: str) -> None:
    small = io.BytesIO()
    Image.new('L', (1, 1)).save(small, 'PNG')
    assert len(asked(url, small.getvalue())['top']) == 5
    for content, status in ((b'no picture', 400), (b'', 413), (b'x' * 20_000_001, 413)):
        with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as caught:
            asked(url, content)
        if isinstance(caught.value, urllib.error.HTTPError):
            with caught.value as answer:
                assert answer.code == status and 'error' in json.load(answer)


def test_the_code_of_the_page(folder: Path, expected: np.ndarray) -> None:
    """Each block runs as it stands, in a folder with the files that it names."""
    text = (ROOT / 'docs' / 'serving.md').read_text('utf-8')
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(blocks) == 3
    run = '\n'.join([*blocks, "print(json.dumps({'jax': logits.tolist(), 'onnx': onnx_logits.tolist()}))"])
    code = 'import json\n' + run
    done = subprocess.run(
        without_flaxnets('exec(open(sys.argv[0]).read())', _written(folder, code)),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for logits in found.values():
        np.testing.assert_allclose(logits[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def _written(folder: Path, code: str) -> Path:
    (folder / 'page.py').write_text(code, 'utf-8')
    return folder / 'page.py'
