"""Puts one small fault at a time into a copy of the project and runs the tests that should notice it.

    python tests/faults.py                    every fault, two at a time; about ten minutes on two cores
    python tests/faults.py padding momentum   those whose names hold one of these words
    python tests/faults.py --list             the table alone

A fault is one line of the code with something wrong in it: a wrong padding, a dropped remainder, a digest
that is not compared. Each is caught when one of its tests fails. One that passes unnoticed is printed as MISSED
and the exit code is 1: some test is missing or cannot fail. The project itself is never changed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[1]
TIMEOUT = 900  # seconds for the tests of one fault


@dataclass(frozen=True)
class Fault:
    """One wrong line.

    Attributes:
      name: what is wrong.
      file: the file that it is put into.
      right: text that occurs exactly once in that file.
      wrong: what takes its place.
      tests: the pytest arguments of the tests that should fail, the quickest first.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str


FAULTS: tuple[Fault, ...] = (
    # The nets.
    Fault(
        'dilated padding',
        'flaxnets/nets/layers.py',
        'padding = self.dilation * (k - 1) // 2',
        'padding = (self.kernel_size - 1) // 2',
        'tests/test_parity.py -k output_stride',
    ),
    Fault(
        'BatchNorm momentum',
        'flaxnets/nets/layers.py',
        'BN_MOMENTUM = 0.1',
        'BN_MOMENTUM = 0.9',
        'tests/test_nets.py -k running_statistics',
    ),
    Fault(
        'BatchNorm epsilon',
        'flaxnets/nets/layers.py',
        'BN_EPSILON = 1e-5',
        'BN_EPSILON = 1e-3',
        'tests/test_parity.py -k odd_sizes',
    ),
    Fault(
        'biased running variance',
        'flaxnets/nets/layers.py',
        '(count / (count - 1))',
        '1.0',
        'tests/test_nets.py -k running_statistics',
    ),
    Fault(
        'statistics of one device',
        'flaxnets/nets/layers.py',
        'if span.axis_name is not None:\n            count',
        'if span.axis_name is None and False:\n            count',
        'tests/test_nets.py -k batch_norm_over',
    ),
    Fault(
        'the factor has no gradient',
        'flaxnets/nets/layers.py',
        'centred * dfactor',
        'dfactor',
        'tests/test_training_parity.py',
    ),
    Fault(
        'shares in another order',
        'flaxnets/nets/layers.py',
        'jnp.concatenate([whole(*part) for part in parts], -1)',
        'jnp.concatenate([whole(*part) for part in parts][::-1], -1)',
        'tests/test_platforms.py -k shares_and_packs',
    ),
    Fault(
        'packs in another order',
        'flaxnets/nets/layers.py',
        'jnp.concatenate(squares, -1)',
        'jnp.concatenate(squares[::-1], -1)',
        'tests/test_platforms.py -k shares_and_packs',
    ),
    Fault(
        'statistics of packs are taken whole',
        'flaxnets/nets/layers.py',
        '_by_packs(whole, by_pack, packs)',
        '_by_packs(whole, by_pack, Packs())',
        'tests/test_platforms.py -k pack_by_pack',
    ),
    Fault(
        'maps that are split are normalised whole',
        'flaxnets/nets/layers.py',
        '_by_packs(whole, in_shares, shares)',
        '_by_packs(whole, in_shares, Packs())',
        'tests/test_platforms.py -k normalise_no_map_whole',
    ),
    Fault(
        "a Res2Net of timm's blocks has four scales",
        'convert/verification.py',
        'block_args = dict(scale=arch.scale)',
        'block_args = dict(scale=4)',
        'tests/test_verify.py -k timms_blocks',
    ),
    Fault(
        'the folded bias is of another mean',
        'flaxnets/nets/layers.py',
        '(offset - mean * factor).astype(how.dtype)',
        '(offset - mean).astype(how.dtype)',
        'tests/test_gpu_forms.py -k "compute_the_same and False"',
    ),
    Fault(
        'BatchNorm is computed by itself on GPUs',
        'flaxnets/nets/layers.py',
        "forms['gpu'] = partial(within,",
        "forms['gpu'] = apart or partial(within,",
        'tests/test_gpu_forms.py -k in_inference',
    ),
    Fault(
        'for oneDNN large kernels are multiplied by the factor too',
        'flaxnets/nets/layers.py',
        'math.prod(pixels) > math.prod(weights)',
        'math.prod(pixels) > 0',
        'tests/test_onednn.py -k within_the_convolution',
    ),
    Fault(
        'many groups of bfloat16 are left as they are for oneDNN',
        'flaxnets/nets/convolution.py',
        "convolve(x.astype('float32'), kernel.astype('float32'), groups=groups).astype(x.dtype)",
        'convolve(x, kernel, groups=groups)',
        'tests/test_onednn.py -k no_convolution_of_bfloat16',
    ),
    Fault(
        'the flags for oneDNN are believed',
        'flaxnets/nets/platforms.py',
        'return asked_for_onednn() and dtype != jnp.float64 and _has_onednn(',
        'return asked_for_onednn() and dtype != jnp.float64 or _has_onednn(',
        'tests/test_onednn.py -k flags_alone',
    ),
    Fault(
        'a convolution is computed again though its result was changed',
        'flaxnets/nets/layers.py',
        'if origin.y is x',
        'if True',
        'tests/test_onednn.py -k on_the_way',
    ),
    Fault(
        'gradients of maps are left to oneDNN where it has none',
        'flaxnets/nets/convolution.py',
        'of_packs = groups > 1 and geometry.stride > 1',
        'of_packs = False',
        'tests/test_onednn.py -k moves_by_two',
    ),
    Fault(
        'half precision is summed as it is',
        'flaxnets/nets/pooling.py',
        'return x.astype(jnp.promote_types(x.dtype, jnp.float32))',
        'return x',
        'tests/test_nets.py -k rounded_once',
    ),
    Fault(
        'the type of the statistics is that of a wider map',
        'flaxnets/nets/layers.py',
        'wide = jnp.promote_types(x.dtype, exact)',
        'wide = exact',
        'tests/test_nets.py -k parameters_of_float32',
    ),
    Fault(
        'an XLA of another version is given flags',
        'flaxnets/onednn.py',
        'and not _other_xla()',
        '',
        'tests/test_onednn.py -k another_xla',
    ),
    Fault(
        'the last row of the blocks of the stem is left out',
        'flaxnets/nets/convolution.py',
        '2 * ((side + 2 * padding - size) // 2 + taps)',
        '2 * ((side + 2 * padding - size) // 2 + taps - 1)',
        'tests/test_gpu_forms.py -k blocks_of_pixels',
    ),
    Fault(
        'two groups are one convolution on GPUs',
        'flaxnets/nets/convolution.py',
        'GPU_FEW_GROUPS = 2',
        'GPU_FEW_GROUPS = 1',
        'tests/test_gpu_forms.py -k two_groups',
    ),
    Fault(
        'maps of the statistics are kept',
        'flaxnets/nets/layers.py',
        'computed_again(mean)',
        'mean',
        'tests/test_platforms.py -k batch_norm',
    ),
    Fault(
        'maps are computed for each use',
        'flaxnets/nets/platforms.py',
        'cpu=_through_a_call',
        'cpu=_identity',
        'tests/test_platforms.py -k computed_once',
    ),
    Fault(
        'last BatchNorm does not start at 0',
        'flaxnets/nets/layers.py',
        'nn.initializers.zeros if self.zero_scale else',
        'nn.initializers.ones if self.zero_scale else',
        'tests/test_nets.py -k zero_init_last',
    ),
    Fault(
        'kernels start by fan in',
        'flaxnets/nets/layers.py',
        "variance_scaling(2.0, 'fan_out', 'normal')",
        "variance_scaling(2.0, 'fan_in', 'normal')",
        'tests/test_nets.py -k initialisation',
    ),
    Fault(
        'bias bound',
        'flaxnets/nets/layers.py',
        'bound = fan_in**-0.5',
        'bound = 3**0.5 * fan_in**-0.5',
        'tests/test_nets.py -k initialisation',
    ),
    Fault(
        'drop path does not keep the mean',
        'flaxnets/nets/layers.py',
        'jnp.where(mask, x / keep, 0)',
        'jnp.where(mask, x, 0)',
        'tests/test_nets.py -k drop_path',
    ),
    Fault(
        'DropBlock scale',
        'flaxnets/nets/layers.py',
        'mask_size / jnp.maximum(kept, 1.0)',
        '1.0 + 0 * jnp.maximum(kept, 1.0)',
        'tests/test_nets.py -k drop_block',
    ),
    Fault(
        'average pool of the shortcut counts its padding',
        'flaxnets/nets/pooling.py',
        'window) / counts',
        'window) / 4',
        'tests/test_parity.py -k "odd_sizes and resnextd"',
    ),
    Fault(
        'global pool avgmax',
        'flaxnets/nets/pooling.py',
        'return 0.5 * (average + maximum)',
        'return average + maximum',
        'tests/test_parity.py -k global_pools',
    ),
    Fault(
        'packs of groups mixed',
        'flaxnets/nets/convolution.py',
        'jnp.eye(in_pack, dtype=kernel.dtype)',
        'jnp.ones((in_pack, in_pack), kernel.dtype)',
        'tests/test_convolution.py -k torchs',
    ),
    Fault(
        'strided 1x1 takes the wrong pixels',
        'flaxnets/nets/convolution.py',
        'stop, (1, stride, stride, 1))',
        'stop, (1, stride, stride, 1))[:, ::-1]',
        'tests/test_convolution.py -k torchs',
    ),
    Fault(
        'rows of a kernel change places in the one product of its gradient',
        'flaxnets/nets/convolution.py',
        'shifted(y, (dilation * i, 0), size, strides)',
        'shifted(y, (dilation * (high - 1 - i), 0), size, strides)',
        'tests/test_convolution.py -k torchs',
    ),
    Fault(
        'rows apart, but not the padding',
        'flaxnets/nets/convolution.py',
        'padding=((apart * padding,) * 2,',
        'padding=((padding,) * 2,',
        'tests/test_convolution.py -k torchs',
    ),
    Fault(
        'convolutions of CPUs on one core',
        'flaxnets/nets/convolution.py',
        'apart=2 if dilated else 1',
        'apart=1',
        'tests/test_convolution.py -k one_core',
    ),
    Fault(
        'packs of a loop change places',
        'flaxnets/nets/convolution.py',
        'y = jnp.moveaxis(y, 0, -2)',
        'y = jnp.moveaxis(y[::-1], 0, -2)',
        'tests/test_convolution.py -k torchs',
    ),
    Fault(
        'the derivative by the mean is lost',
        'flaxnets/nets/layers.py',
        'offset - (mean - near) * factor',
        'offset',
        'tests/test_training_parity.py -k sgd_step_equals',
    ),
    Fault(
        'squeeze and excitation gate',
        'flaxnets/nets/blocks.py',
        'x * jax.nn.sigmoid(gate)',
        'x * jax.nn.hard_sigmoid(gate)',
        'tests/test_parity.py -k "odd_sizes and seresnext"',
    ),
    Fault(
        'Res2Net adds in the first block',
        'flaxnets/nets/blocks.py',
        'if outputs and not self.has_downsample:',
        'if outputs:',
        'tests/test_parity.py -k "odd_sizes and res2net"',
    ),
    Fault(
        'Res2Net passes its last part unpooled',
        'flaxnets/nets/blocks.py',
        'avg_pool_3x3(last, self.stride) if self.has_downsample else last',
        'last[:, :: self.stride, :: self.stride] if self.has_downsample else last',
        'tests/test_parity.py -k "odd_sizes and res2net"',
    ),
    Fault(
        'split attention width',
        'flaxnets/nets/blocks.py',
        'max(32, x.shape[-1] * radix // 4)',
        'max(32, x.shape[-1] * radix // 2)',
        'tests/test_nets.py -k names_order',
    ),
    Fault(
        'shortcut convolution number',
        'flaxnets/nets/blocks.py',
        'first_index=1 if self.arch.avg_down else 0',
        'first_index=0',
        'tests/test_nets.py -k names_order',
    ),
    Fault(
        'depth of drop path',
        'flaxnets/nets/resnet.py',
        'self.drop_path_rate * (before + i) / last',
        'self.drop_path_rate * (before + i + 1) / (last + 1)',
        'tests/test_nets.py -k drop_path',
    ),
    Fault(
        'frozen stage learns its statistics',
        'flaxnets/nets/resnet.py',
        'train and self.frozen_stages <= i',
        'train and self.frozen_stages <= i + 1',
        'tests/test_nets.py -k frozen',
    ),
    Fault(
        'dilation of output stride 8',
        'flaxnets/nets/resnet.py',
        'dilation, stride = dilation * stride, 1',
        'dilation, stride = stride, 1',
        'tests/test_parity.py -k output_stride',
    ),
    Fault(
        'published cardinality',
        'flaxnets/zoo/architectures.py',
        "'resnext101_64x4d': _resnext(_L101, 64, 4),",
        "'resnext101_64x4d': _resnext(_L101, 32, 8),",
        'tests/test_zoo.py tests/test_nets.py -k "cardinal or zoo or resnext101_64x4d"',
    ),
    # Weights and files.
    Fault(
        'first kernel of other channels is not scaled',
        'flaxnets/store/weights.py',
        '[:, :, :in_chans] * (3 / in_chans)',
        '[:, :, :in_chans]',
        'tests/test_weights.py -k channels',
    ),
    Fault(
        'digests are not compared',
        'flaxnets/store/weights.py',
        'if expected.get(name) != found.get(name))',
        'if name not in found)',
        'tests/test_weights.py -k flipped',
    ),
    Fault(
        'gap between tensors',
        'flaxnets/store/safetensors_file.py',
        'if entry.begin != position:',
        'if entry.begin < position:',
        'tests/test_safetensors.py -k broken',
    ),
    Fault(
        'bytes after the last tensor',
        'flaxnets/store/safetensors_file.py',
        'if position != size:',
        'if position > size:',
        'tests/test_safetensors.py -k broken',
    ),
    Fault(
        'axes of a kernel',
        'convert/names/tree.py',
        'return (3, 2, 0, 1) if len(self.shape) == 4',
        'return (3, 2, 1, 0) if len(self.shape) == 4',
        'tests/test_verify.py -k right_conversion',
    ),
    Fault(
        'NaN in a tensor',
        'convert/names/tree.py',
        'elif not all_finite(tensor):',
        'elif False:',
        'tests/test_conversion.py -k misfits',
    ),
    Fault(
        'CRC is not compared',
        'convert/formats/pth_zip.py',
        'if zlib.crc32(content) != crc:',
        'if crc == 1:',
        'tests/test_convert_faults.py tests/test_pth_hostile.py',
    ),
    Fault(
        'overlapping entries of a zip',
        'convert/formats/pth_zip.py',
        '        if end > start:\n',
        '        if end > start + 1_000_000_000:\n',
        'tests/test_pth_hostile.py',
    ),
    Fault(
        'tensor beyond its storage',
        'convert/formats/pth.py',
        'last = tensor.offset + sum(',
        'last = sum(',
        'tests/test_pth_tensors.py',
    ),
    Fault(
        'offset in bytes',
        'convert/formats/pth.py',
        'tensor.offset * itemsize',
        'tensor.offset',
        'tests/test_pth_tensors.py -k views',
    ),
    Fault(
        'mmpretrain shortcut',
        'convert/names/layouts.py',
        "    'layer1.0.downsample.0': 'layer1.0.downsample.1',\n",
        '',
        'tests/test_layouts.py -k mmpretrain',
    ),
    Fault(
        'folding without epsilon',
        'convert/arithmetic.py',
        'np.sqrt(var + BN_EPSILON)',
        'np.sqrt(var)',
        'tests/test_arithmetic.py -k folded',
    ),
    Fault(
        'average in single precision',
        'convert/arithmetic.py',
        'total = np.zeros(tensor.shape, np.float64)',
        'total = np.zeros(tensor.shape, np.float32)',
        'tests/test_arithmetic.py -k float64',
    ),
    Fault(
        'statistics are cast',
        'convert/arithmetic.py',
        "'float32' if statistics else dtype",
        'dtype',
        'tests/test_arithmetic.py -k cast',
    ),
    Fault(
        'altered published file',
        'convert/conversion.py',
        'if published and published.sha256 and not digest.startswith(published.sha256):',
        'if False:',
        'tests/test_conversion.py -k hash',
    ),
    # Images.
    Fault(
        '16 bits to 8',
        'flaxnets/images/transforms.py',
        '(values.astype(np.uint32) + 128) // 257',
        'values.astype(np.uint32) // 257',
        'tests/test_preprocess.py -k "files or arrays"',
    ),
    # Data.
    Fault(
        'augmentation is the same for all images',
        'train/data/images.py',
        'np.random.Philox(key=[self.seed, position])',
        'np.random.Philox(key=[self.seed, 0])',
        'tests/test_data.py',
    ),
    Fault(
        'last images of an evaluation',
        'train/data/images.py',
        'return -(-len(self.source) // self.share.batch_size)',
        'return len(self.source) // self.share.batch_size',
        'tests/test_data.py -k evaluation',
    ),
    Fault(
        'padding counts',
        'train/data/images.py',
        'position < count)',
        'True)',
        'tests/test_data.py -k evaluation',
    ),
    Fault(
        'hosts take the same images',
        'train/data/images.py',
        'return batch * self.batch_size + self.host * self.rows + row',
        'return batch * self.batch_size + row',
        'tests/test_data.py -k hosts',
    ),
    Fault(
        'a resumed run starts a batch late',
        'train/data/batches.py',
        'steps = range(start_step, ENDLESS // share.rows)',
        'steps = range(start_step and start_step + 1, ENDLESS // share.rows)',
        'tests/test_data.py -k goes_on',
    ),
    Fault(
        'crop ratio drawn evenly',
        'train/data/augment.py',
        'ratio = math.exp(rng.uniform(low, high))',
        'ratio = rng.uniform(*self.ratio)',
        'tests/test_augment.py -k boxes',
    ),
    Fault(
        'area of the authors crop',
        'train/data/augment.py',
        'max(smallest, COVERED * width * height) <= w * h',
        'smallest <= w * h',
        'tests/test_augment.py',
    ),
    Fault(
        'probability of an operation',
        'train/data/autoaugment.py',
        'if rng.random() > probability:\n            continue\n        signed',
        'if rng.random() < probability:\n            continue\n        signed',
        'tests/test_autoaugment.py tests/test_augment.py',
    ),
    Fault(
        'solarise add',
        'train/data/autoaugment.py',
        'ImageOps.solarize(lifted, 128)',
        'ImageOps.solarize(lifted, 127)',
        'tests/test_augment.py tests/test_autoaugment.py',
    ),
    # The step.
    Fault(
        'flip the wrong way',
        'train/step/pixels.py',
        'image[:, ::-1], image)',
        'image[::-1], image)',
        'tests/test_pixels.py -k flips',
    ),
    Fault(
        'erased area',
        'train/step/pixels.py',
        'ERASED_AREA = (0.02, 0.4)',
        'ERASED_AREA = (0.02, 0.33)',
        'tests/test_pixels.py -k erases',
    ),
    Fault(
        'mixup of images and not of targets',
        'train/step/mixing.py',
        'share * targets + (1 - share) * targets[::-1]',
        'targets + 0 * share',
        'tests/test_mixing.py',
    ),
    Fault(
        'share of a cut at the border',
        'train/step/mixing.py',
        'share = jnp.where(use_cutmix, cut.mean(), share)',
        'share = jnp.where(use_cutmix, share, share)',
        'tests/test_mixing.py',
    ),
    Fault(
        'gradients of one device',
        'train/step/step.py',
        'loss, batch_stats, grads = lax.pmean((loss, batch_stats, grads), axis_name)',
        'loss, batch_stats = lax.pmean((loss, batch_stats), axis_name)',
        'tests/test_step.py -k number_of_devices',
    ),
    Fault(
        'sum of accumulated gradients',
        'train/step/step.py',
        'jax.tree.map(lambda x: x / parts, (loss, grads))',
        'jax.tree.map(lambda x: x * 1, (loss, grads))',
        'tests/test_step.py -k accumulation',
    ),
    Fault(
        'a step that is not finite changes parameters',
        'train/step/step.py',
        'jnp.where(finite, new, old)',
        'jnp.where(finite | True, new, old)',
        'tests/test_step.py -k not_finite',
    ),
    Fault(
        'norm without vectors',
        'train/step/step.py',
        '[jnp.concatenate(vectors), *others] if vectors else others',
        'others',
        'tests/test_training_parity.py -k sgd_step_equals',
    ),
    Fault(
        'ties are correct',
        'train/step/step.py',
        '(logits == own) & (jnp.arange(',
        '(logits != logits) & (jnp.arange(',
        'tests/test_step.py -k each_image',
    ),
    Fault(
        'NaN is correct',
        'train/step/step.py',
        'jnp.where(finite, before.sum(-1), jnp.iinfo(jnp.int32).max)',
        'before.sum(-1)',
        'tests/test_evaluate.py tests/test_step.py',
    ),
    Fault(
        'what decays',
        'train/step/optimizer.py',
        "return path[-1] == 'kernel'",
        "return path[-1] != 'scale'",
        'tests/test_optimizer.py',
    ),
    Fault(
        'Nesterov',
        'train/step/optimizer.py',
        'optax.trace(s.momentum, s.nesterov)',
        'optax.trace(s.momentum, False)',
        'tests/test_optimizer.py -k torch',
    ),
    Fault(
        'layer decay',
        'train/step/optimizer.py',
        'len(STAGES) - 1 - stage_of(path)',
        'len(STAGES) - stage_of(path)',
        'tests/test_optimizer.py',
    ),
    Fault(
        'cosine one step early',
        'train/step/schedule.py',
        'xp.clip(total - step, 0,',
        'xp.clip(total - step - 1, 0,',
        'tests/test_schedule.py',
    ),
    Fault(
        'step schedule one epoch late',
        'train/step/schedule.py',
        '[epoch // s.step_epochs]',
        '[xp.maximum(epoch - 1, 0) // s.step_epochs]',
        'tests/test_schedule.py',
    ),
    Fault(
        'DropBlock one epoch late',
        'train/step/schedule.py',
        's.drop_block_rate * xp.asarray(epoch + 1, float)',
        's.drop_block_rate * xp.asarray(epoch, float)',
        'tests/test_schedule.py tests/test_step.py -k drop_block',
    ),
    Fault(
        'variance of MSRAPrelu',
        'train/step/state.py',
        '2 / (1 + 0.25**2)',
        '2 / (1 + 0.25)',
        'tests/test_step.py -k rule',
    ),
    # The run.
    Fault(
        'the marker of a bucket goes up among the files',
        'flaxnets/store/arrays.py',
        'sorted(names - {MARKER})',
        'sorted(names)',
        'tests/test_buckets.py -k only_the_last',
    ),
    Fault(
        'checkpoint digests are not compared',
        'flaxnets/store/arrays.py',
        "sound = document['sha256'] == _sha256(manifest)",
        'sound = True',
        'tests/test_checkpoint.py -k flipped',
    ),
    Fault(
        'one checkpoint more stays',
        'train/run/checkpoints.py',
        '*steps[: self._keep_last]',
        '*steps[: self._keep_last + 1]',
        'tests/test_checkpoint.py -k stay',
    ),
    Fault(
        'the worst checkpoint stays',
        'train/run/checkpoints.py',
        'if score is not None), reverse=True)',
        'if score is not None))',
        'tests/test_checkpoint.py -k stay',
    ),
    Fault(
        'scores that are NaN',
        'train/run/checkpoints.py',
        'if score is not None and not math.isfinite(score):',
        'if False:',
        'tests/test_checkpoint.py -k finite',
    ),
    Fault(
        'the log repeats a step',
        'train/run/log.py',
        "record['step'] > step",
        "record['step'] > step + 1",
        'tests/test_log.py',
    ),
    Fault(
        'learning rate of the next step is logged',
        'train/run/meter.py',
        'self._rate(done - 1)',
        'self._rate(done)',
        'tests/test_loop.py -k what_a_run_leaves',
    ),
    Fault(
        'other images at a resume',
        'train/loop.py',
        "if meta['data'].get(part) == fingerprint:",
        'if True:',
        'tests/test_loop.py -k another_run',
    ),
    Fault(
        'top-5',
        'train/evaluation/metrics.py',
        '(self.ranks < 5).sum()',
        '(self.ranks <= 5).sum()',
        'tests/test_evaluate.py',
    ),
)


def check(fault: Fault) -> None:
    """Raises: SystemExit: the fault's text is not there exactly once."""
    found = (ROOT / fault.file).read_text('utf-8').count(fault.right)
    if found != 1:
        raise SystemExit(f'{fault.name}: {fault.right!r} is {found} times in {fault.file}; mend the table')


def copy_project(target: Path) -> Path:
    """A copy of the files that git knows, changed ones as they are now."""
    listed = subprocess.run(
        ['git', 'ls-files', '-z'], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split('\0')):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def is_caught(fault: Fault, copy: Path) -> bool:
    """Whether the tests fail once the fault is in the copy; the copy is whole again afterwards."""
    file = copy / fault.file
    sound = file.read_text('utf-8')
    file.write_text(sound.replace(fault.right, fault.wrong), 'utf-8')
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-x',
        '-q',
        '-p',
        'no:cacheprovider',
        *shlex.split(fault.tests),
    ]
    environment = {**os.environ, 'PYTHONPATH': str(copy), 'PYTHONDONTWRITEBYTECODE': '1'}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(sound, 'utf-8')
    if done.returncode not in (0, 1):  # 1: tests failed; others: pytest could not run them
        collected = 'error' in done.stdout.lower() and 'collect' in done.stdout.lower()
        if not collected:
            raise SystemExit(
                f'{fault.name}: pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}'
            )
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('words', nargs='*', metavar='WORD', help='only faults whose names hold one of these')
    parser.add_argument('--list', action='store_true', help='print the table and run nothing')
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='faults at a time (2)')
    options = parser.parse_args()
    chosen = [f for f in FAULTS if not options.words or any(word in f.name for word in options.words)]
    for fault in FAULTS:
        check(fault)
    if options.list:
        for fault in chosen:
            print(f'{fault.name:60} {fault.file}')
        return 0
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Path] = Queue()
        for i in range(options.jobs):
            copies.put(copy_project(Path(folder) / str(i)))

        def run(fault: Fault) -> tuple[Fault, bool, float]:
            copy, start = copies.get(), time.monotonic()
            try:
                return fault, is_caught(fault, copy), time.monotonic() - start
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            for fault, caught, seconds in pool.map(run, chosen):
                print(f'{"caught" if caught else "MISSED"}  {seconds:6.1f} s  {fault.name}', flush=True)
                if not caught:
                    missed.append(fault)
    print(f'{len(chosen) - len(missed)} of {len(chosen)} faults are caught')
    return 1 if missed else 0


if __name__ == '__main__':
    sys.exit(main())
