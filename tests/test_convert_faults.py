"""The converter under faults: killed, out of space, given damage. `FLAXNETS_FAULTS=full` for full numbers."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import numpy_state, random_variables, randomise, timm_net

from convert.__main__ import main
from convert.conversion import open_checkpoint
from convert.formats.pth import read_pth
from convert.formats.pth_write import write_pth
from convert.names.tree import to_state
from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from flaxnets.store.files import work_path
from flaxnets.store.safetensors_file import write_safetensors

pytestmark = pytest.mark.fault
FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('faults') / 'net.pth'
    write_pth(path, numpy_state(randomise(timm_net('resnest_tiny'))))
    return path


def start(*arguments: object, program: str = '') -> subprocess.Popen[str]:
    """python -m convert in a process of its own."""
    code = f"""
import sys
from convert.__main__ import main
{program}
sys.exit(main(sys.argv[1:]))
"""
    return python(code, *arguments)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, '-c', code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith('.'))


TARGETS = ['net', 'back.pth', 'back.safetensors']

# Writes in children, which are killed: they need not import and open everything again.
DYING = """
import os, random, signal, sys, time
from pathlib import Path
from convert.conversion import open_checkpoint
from convert.writing import write

file, *targets = map(Path, sys.argv[1:])
checkpoint = open_checkpoint(file)
checkpoint.variables  # so that the children need not ask JAX

def begin(prepare):
    child = os.fork()
    if child == 0:
        prepare()
        write(checkpoint, out, overwrite=True)
        os._exit(0)
    return child

def end(child, moment):
    _, status = os.waitpid(child, 0)
    visible = ','.join(sorted(p.name for p in out.parent.iterdir() if not p.name.startswith('.')))
    print('after', out.name, moment, visible or '-', flush=True)
    if out.exists():
        open_checkpoint(out).variables
    return os.waitstatus_to_exitcode(status)
"""

AT_ANY_MOMENT = (
    DYING
    + """
random.seed(0)
for out in targets:
    start = time.monotonic()
    assert end(begin(lambda: None), 'whole') == 0
    whole = time.monotonic() - start
    for i in range(TIMES):
        child = begin(lambda: None)
        time.sleep(random.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        end(child, i)
"""
)

BETWEEN_TWO_STEPS = (
    DYING
    + """
def dying(call, moment):
    def counted(*arguments, **options):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counted

def prepare():
    for name in ('fsync', 'mkdir', 'rename', 'replace', 'rmdir', 'unlink'):
        setattr(os, name, dying(getattr(os, name), moment))

for out in targets:
    assert end(begin(lambda: None), 0) == 0
    for moment in range(1, 100):
        calls = 0
        if end(begin(prepare), moment) == 0:
            break
"""
)


def seen_after(program: str, file: Path, tmp_path: Path) -> dict[str, list[str]]:
    """What was visible after each child that wrote a target; each target is in a folder of its own."""
    targets = [tmp_path / f'for {target}' / target for target in TARGETS]
    for target in targets:
        target.parent.mkdir()
    process = python(program, file, *targets)
    output, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    lines = [line.split() for line in output.splitlines() if line.startswith('after ')]
    expected = read_pth(file)
    for target in targets:
        assert main([str(file), '--out', str(target), '--force']) == 0
        assert hidden(target.parent) == []
        found = open_checkpoint(target).state
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
    return {target: [words[3] for words in lines if words[1] == target] for target in TARGETS}


def test_killed_at_any_moment_leaves_all_or_nothing(file: Path, tmp_path: Path) -> None:
    program = AT_ANY_MOMENT.replace('TIMES', '20' if FULL else '5')
    for target, seen in seen_after(program, file, tmp_path).items():
        assert set(seen) <= {'-', target, f'{target},{target}.json'} and len(seen) > 5


def test_killed_between_any_two_steps_of_writing(file: Path, tmp_path: Path) -> None:
    """The first child writes; each next one is killed at one change of the disk later than the one before."""
    for target, seen in seen_after(BETWEEN_TWO_STEPS, file, tmp_path).items():
        whole = target if target == 'net' else f'{target},{target}.json'
        # A directory cannot take the name of another: for a moment there is none.
        assert seen.count('-') == (target == 'net') and set(seen) <= {whole, '-'} and len(seen) > 5


def test_interrupted_leaves_nothing(file: Path, tmp_path: Path) -> None:
    # The interrupt comes while the arrays are being written.
    program = """
import os, signal
from flaxnets.store import weights
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
write = weights.write_into
def interrupted(*arguments):
    written = write(*arguments)
    os.kill(os.getpid(), signal.SIGINT)
    return written
weights.write_into = interrupted
"""
    process = start(file, '--out', tmp_path / 'net', program=program)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130 and 'nothing was written' in error and 'Traceback' not in error
    assert list(tmp_path.iterdir()) == []


NO_SPACE = """
import resource, signal, sys
from convert.__main__ import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
for out in sys.argv[2:]:
    print('to', out, file=sys.stderr, flush=True)
    assert main([sys.argv[1], '--out', out, '--force']) == 1
"""


def test_no_space_is_one_error_and_keeps_what_was_there(file: Path, tmp_path: Path) -> None:
    targets = [tmp_path / target for target in TARGETS]
    for out in targets:
        assert main([str(file), '--out', str(out)]) == 0
    before = [open_checkpoint(out).source for out in targets]
    process = python(NO_SPACE, file, *targets)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    for out, said in zip(targets, error.split('to /')[1:], strict=True):
        assert f'error: {out}: cannot be written' in said and said.count('error: /') == 1
    assert hidden(tmp_path) == []
    assert [open_checkpoint(out).source for out in targets] == before


def test_too_little_space_is_said_beforehand(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    assert main([str(file), '--out', str(tmp_path / 'net')]) == 1
    error = capsys.readouterr().err
    assert 'MB are needed, 0 MB are free' in error
    assert list(tmp_path.iterdir()) == []


def test_a_source_inside_out_is_not_destroyed(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'net'
    assert main([str(file), '--out', str(out)]) == 0
    inside = out / 'inside.pth'
    inside.write_bytes(file.read_bytes())
    assert main([str(inside), '--out', str(out), '--force']) == 1
    assert 'is inside' in capsys.readouterr().err and inside.exists()


@pytest.mark.parametrize('kind', ['net', 'net.pth'])
def test_a_source_may_be_replaced_by_itself(file: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / kind
    assert main([str(file), '--out', str(source)]) == 0
    assert main([str(source), '--out', str(source)]) == 1
    assert main([str(source), '--out', str(source), '--force']) == 0
    expected, found = read_pth(file), open_checkpoint(source).state
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_stale_work_of_dead_processes_is_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    target = tmp_path / 'net'
    mine = work_path(target)
    mine.mkdir()
    dead = subprocess.Popen(['true'])
    dead.wait()
    stale = mine.with_name(mine.name.replace(f'.{os.getpid()}.', f'.{dead.pid}.'))
    stale.mkdir()
    elsewhere = stale.with_name(f'.net.another-host.{dead.pid}.00.part')
    elsewhere.mkdir()
    work_path(target)
    assert mine.exists() and elsewhere.exists() and not stale.exists()


# --- damage


@pytest.fixture(scope='module')
def tiny() -> dict[str, np.ndarray]:
    net = build(zoo.NETS['resnest_tiny'], num_classes=10)
    return {name: np.ascontiguousarray(t) for name, t in to_state(random_variables(net), net).items()}


def written(tiny: dict[str, np.ndarray], folder: Path, kind: str) -> Path:
    path = folder / f'net.{"safetensors" if kind == "safetensors" else "pth"}'
    if kind == 'safetensors':
        write_safetensors(path, tiny)
    else:
        tensors = {name: torch.from_numpy(t) for name, t in tiny.items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == 'zip')
    return path


def convert_damaged(path: Path) -> dict[str, np.ndarray] | None:
    """What the whole command makes of a file: the tensors in its directory, or None and nothing left."""
    out = path.with_name('out')
    if main([str(path), '--out', str(out)]) == 0:
        found = {name: np.array(t) for name, t in open_checkpoint(out).state.items()}
        shutil.rmtree(out)
        return found
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return None


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in b)


def test_a_flipped_bit_of_a_zip_is_never_used(tiny: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = written(tiny, tmp_path, 'zip')
    clean, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(1000 if FULL else 20):
        damaged = bytearray(clean)
        damaged[int(rng.integers(len(clean)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        found = convert_damaged(path)
        refused += found is None
        # What a bit of padding or of a date says is of no consequence.
        assert found is None or same(found, tiny)
    assert refused > (900 if FULL else 15)
    path.write_bytes(clean)
    found = convert_damaged(path)
    assert found is not None and same(found, tiny)


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_damaged_files_raise_nothing_but_our_own_error(
    tiny: dict[str, np.ndarray], tmp_path: Path, kind: str
) -> None:
    """Bytes changed, cut off, put in: the whole command ends in an error of ours or in a directory."""
    path = written(tiny, tmp_path, kind)
    clean, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(3400 if FULL else 40):
        damaged = bytearray(clean)
        # Most of the damage where the structure is: at the start and at the end.
        reach = len(clean) if rng.random() < 0.2 else 20_000
        where = int(rng.integers(min(reach, len(clean)))) * (1 if rng.random() < 0.5 else -1)
        choice = rng.integers(4)
        if choice == 0:
            damaged[where] ^= 1 << int(rng.integers(8))
        elif choice == 1:
            damaged[where] = int(rng.integers(256))
        elif choice == 2:
            del damaged[where:]
        else:
            damaged[where:where] = rng.bytes(int(rng.integers(1, 9)))
        path.write_bytes(damaged)
        found = convert_damaged(path)
        refused += found is None
        assert kind != 'zip' or found is None or same(found, tiny)
    assert refused > (1700 if FULL else 14)


def test_a_directory_s_json_may_hold_anything(file: Path, tmp_path: Path) -> None:
    out = tmp_path / 'net'
    assert main([str(file), '--out', str(out)]) == 0
    rng = np.random.default_rng(0)
    for name in ('config.json', 'certificate.json'):
        clean = (out / name).read_bytes()
        for content in (
            b'',
            b'[]',
            b'{}',
            b'null',
            b'\xff',
            b'{"format": "flaxnets"}',
            clean[: len(clean) // 2],
        ):
            (out / name).write_bytes(content)
            with pytest.raises(FlaxnetsError):
                open_checkpoint(out)
        for _ in range(300 if FULL else 15):
            damaged = bytearray(clean)
            damaged[int(rng.integers(len(clean)))] = int(rng.integers(32, 127))
            (out / name).write_bytes(damaged)
            with contextlib.suppress(FlaxnetsError):
                open_checkpoint(out)
        (out / name).write_bytes(clean)
    assert weights.read_config(out).name == 'resnest_tiny'


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
def test_peak_memory(tmp_path: Path) -> None:
    """Under twice the file and 50 MB above what the imports take."""
    state = tmp_path / 'big.pth'
    write_pth(state, numpy_state(timm_net('resnest50d')))
    # ru_maxrss would begin with that of the process which started this one.
    code = """
import re, sys
from pathlib import Path
from convert.__main__ import main
def peak():
    return int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024
before = peak()
assert main(sys.argv[1:]) == 0
print(peak() - before)
"""
    arguments = [str(state), '--model', 'resnest50d', '--out', str(tmp_path / 'net')]
    result = subprocess.run(
        [sys.executable, '-c', code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak = int(result.stdout.splitlines()[-1])
    assert state.stat().st_size / 2 < peak < 2 * state.stat().st_size + 50e6
