"""Set-up shared by the tests: torch and torchvision beside each other, one small helper."""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import torch
import torchvision_ops

torchvision_ops.define_missing()
torch.set_num_threads(2)
