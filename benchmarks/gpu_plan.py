"""Compares the package's forms with Flax's on GPUs, by the compiled programs and without a GPU.

    python -m benchmarks.gpu_plan [--nets NET ...] [--only forward step] [--out build/bench]

Needs JAX's plugin for CUDA (`pip install "jax[cuda13]"`, Python 3.12), which compiles for an H200 that is not
there. Without a card cuDNN's algorithms are not tried out, and no time is known. Compared are the bytes that
the program moves, how many kernels it starts, and its memory: a forward of bfloat16 images, and the training
step of one device. Findings are kept as they come in `gpu_plan.jsonl`; a second call leaves out those.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks import gpu_program, report
from benchmarks.gpu import NETS
from benchmarks.tpu import compare, key, lowered
from flaxnets.words import count

# As XLA describes an NVIDIA H200.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--nets', nargs='+', default=list(NETS), choices=NETS, metavar='NET')
    parser.add_argument('--only', nargs='+', choices=('forward', 'step'), default=['forward', 'step'])
    parser.add_argument('--out', default='build/bench')
    options = parser.parse_args()
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')  # of a driver that is not there
    jax.config.update('jax_platforms', 'cpu')
    out = Path(options.out)
    try:
        description = topologies.get_topology_desc(
            'h200', platform='cuda', target_config=H200, topology='1x1x1'
        )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    except (NotImplementedError, RuntimeError) as error:
        parser.error(f'JAX cannot compile for CUDA here: {error} (pip install "jax[cuda13]")')

    def measured(name: str, what: str) -> dict[str, Any]:
        return finding(lowered(name, what, description.devices).compile())

    compare(options.nets, options.only, out / 'gpu_plan.jsonl', {}, measured, table)


def finding(program: Any) -> dict[str, Any]:
    memory = program.memory_analysis()
    return dict(
        **gpu_program.read(program.as_text())._asdict(),
        memory=memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    )


def table(lines: list[dict[str, Any]]) -> str:
    """Ours beside plain Flax, a row for each net and job, and the geometric means."""
    found = {key(line): line for line in lines}
    text = [
        f'jax {jax.__version__}, for an H200, bfloat16, batches of `benchmarks/gpu.py`. Ours / plain Flax.',
        '',
        '| | net | GB moved | ratio | kernels started | GiB of memory |',
        '|---|---|---|---|---|---|',
    ]
    ratios: dict[str, list[float]] = {}
    for what in ('forward', 'step'):
        for name in dict.fromkeys(line['net'] for line in lines):
            ours, plain = (found.get((name, '', what, kind)) for kind in ('flaxnets', 'plain'))
            if not ours or not plain:
                continue
            ratios.setdefault(what, []).append(ours['moved'] / plain['moved'])
            cells = [what, f'`{name}`', f'{ours["moved"] / 1e9:.1f} / {plain["moved"] / 1e9:.1f}']
            cells += [f'{ratios[what][-1]:.2f}', f'{ours["started"]} / {plain["started"]}']
            cells.append(f'{ours["memory"] / 2**30:.2f} / {plain["memory"] / 2**30:.2f}')
            text.append(f'| {" | ".join(cells)} |')
    for what, values in ratios.items():
        mean, number = report.geometric_mean(values), count(len(values), 'net')
        text.append(f'\n{what}: {mean:.2f} of the bytes of plain Flax (geometric mean of {number}).')
    return '\n'.join(text) + '\n'


if __name__ == '__main__':
    main()
