"""Compares the conversion of a large checkpoint with `torch.load` and a plain copy of the file.

    python benchmarks/convert.py [NET]

Makes a checkpoint of the net (resnest269e, 445 MB, random weights) in both of torch's formats, then measures
each job in a process of its own: seconds from the first byte read to the directory being complete, imports
left out, and the peak memory above that of the imports. Goals: at most three times the seconds of
`torch.load` plus the copy, and a peak of at most twice the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 3
MEASURE = r"""
import json, re, shutil, sys, time
from pathlib import Path

def peak():  # of this program: ru_maxrss would begin with that of the process which started it
    return int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1])

{imports}
before = peak()
start = time.perf_counter()
{job}
seconds = time.perf_counter() - start
print(json.dumps([seconds, (peak() - before) * 1024]))
"""
CONVERT = """
from convert.conversion import open_checkpoint
from convert.writing import write
"""
PLAIN_COPY = """
shutil.copyfile(source, target)
with open(target, 'rb+') as file:
    os.fsync(file.fileno())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('net', nargs='?', default='resnest269e')
    name = parser.parse_args().net
    with tempfile.TemporaryDirectory(dir='.') as folder:
        for kind, path in make(name, Path(folder)).items():
            size = path.stat().st_size
            out = Path(folder) / 'out'
            job = f'write(open_checkpoint({str(path)!r}, {name!r}), {str(out)!r}, overwrite=True)'
            source = f'source, target = {str(path)!r}, {str(path) + ".copy"!r}\n'
            plain = source + 'torch.load(source, weights_only=True)' + PLAIN_COPY
            best: dict[str, list[float]] = {}
            for _ in range(ROUNDS):  # in turns, so that other work on the machine slows both
                for what, imports, code in (('convert', CONVERT, job), ('plain', 'import os, torch', plain)):
                    found = measure(imports, code)
                    best[what] = [min(pair) for pair in zip(best.get(what, found), found, strict=True)]
            (ours, peak), (theirs, _) = best['convert'], best['plain']
            print(
                f'{kind:7} {size / 1e6:.0f} MB: converted in {ours:.2f} s, torch.load and a copy '
                f'{theirs:.2f} s, ratio {ours / theirs:.2f}; peak memory {peak / size:.2f} x the file',
                flush=True,
            )


def make(name: str, folder: Path) -> dict[str, Path]:
    """The net's checkpoint in torch's two formats."""
    sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))
    import torchvision_ops

    torchvision_ops.define_missing()
    import timm
    import torch

    state = timm.create_model(name).state_dict()
    paths = {kind: folder / f'{kind}.pth' for kind in ('zip', 'legacy')}
    for kind, path in paths.items():
        torch.save(state, path, _use_new_zipfile_serialization=kind == 'zip')
    return paths


def measure(imports: str, job: str) -> list[float]:
    """Seconds and peak bytes of a job in a new process."""
    code = MEASURE.format(imports=imports, job=job)
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, 'PYTHONPATH': root, 'JAX_PLATFORMS': 'cpu'}
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment
    )
    seconds, peak = json.loads(result.stdout.splitlines()[-1])
    return [seconds, peak]


if __name__ == '__main__':
    main()
