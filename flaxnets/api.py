"""The library's main functions: make a net, load weights, describe them, prepare images for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from . import zoo
from .errors import FlaxnetsError
from .images.preprocess import Preprocess
from .images.transforms import MAX_PIXELS, Transform
from .nets.resnet import ResNet, build
from .siblings import sibling
from .store import runs, weights
from .store.remote import names_store
from .zoo.records import Config

_PUBLISHED, _DIRECTORY, _RUN = 'the name of published weights', 'a directory of weights', 'a training run'


def create(name: str, num_classes: int = 1000, in_chans: int = 3, **options: Any) -> ResNet:
    """Makes a net by name, without weights.

    Args:
      name: any name that `list_models` gives, or an alias: timm's, torchvision's, mmpretrain's, the
        authors'. A tag (`resnext50_32x4d.gluon_in1k`) is accepted and makes the same net.
      num_classes: outputs of the classifier; 0 gives pooled features [N, 2048] instead of logits.
      in_chans: number of channels of the images.
      **options: `dtype`, `param_dtype`, `global_pool`, `drop_rate`, `drop_path_rate`,
        `drop_block_rate`, `output_stride`, `frozen_stages`, `freeze_bn`, `features_only`, `out_indices`,
        `axis_name`, `remat`, `zero_init_last`: see `flaxnets.nets.resnet.ResNet`.

    Returns:
      A Flax module. `model.init(key, images)` makes its variables; `model.apply(variables, images,
      train=False)` takes images [N, H, W, in_chans].

    Raises:
      FlaxnetsError: an unknown name (the message has the nearest ones), or bad values (it has all of them).

    Examples:
      >>> model = flaxnets.create('resnest50d', num_classes=10, drop_rate=0.2)
      >>> model.num_features
      2048
      >>> flaxnets.create('resnest50')  # the authors' name of the same net
      ResNet(...)
    """
    arch_name, _ = zoo.resolve(name)
    return build(zoo.NETS[arch_name], num_classes, in_chans, **options)


@dataclass(frozen=True)
class Asked:
    """Choices of what to load from a source that holds several things, or more than a net.

    Attributes:
      model: name of the architecture, where the tensors of a file leave a choice; refused if they contradict.
      key: where in a file with several state dicts the one to take is, such as 'state.model'.
      prefix: what the names of the tensors to take begin with, in a state dict with several nets.
      ema: take the averaged weights, where a source has them beside the trained ones.
      approximate: accept weights of a net that computes slightly differently.
      drop_head: leave out the classifier, even one that none of the nets can have.
    """

    model: str | None = None
    key: str | None = None
    prefix: str | None = None
    ema: bool = True
    approximate: bool = False
    drop_head: bool = False

    def of_file(self) -> dict[str, Any]:
        """All choices but `model`, as arguments of the converter: only files of other libraries need them."""
        return {name: value for name, value in vars(self).items() if name != 'model'}

    def refuse(self, source: object, kind: str, *allowed: str) -> None:
        """Raises an error if a choice was made that does not apply to this kind of source.

        Args:
          source: the source, for the message.
          kind: its kind in words, for the message.
          *allowed: names of the choices that do apply.
        """
        usual = Asked().of_file()
        given = [f'{name}={value!r}' for name, value in self.of_file().items() if value != usual[name]]
        wrong = [text for text in given if text.partition('=')[0] not in allowed]
        if wrong:
            raise FlaxnetsError(
                f'{source} is {kind}, which holds one net as it is: it takes no {", ".join(wrong)}'
            )


def config(source: str | os.PathLike[str], *, model: str | None = None, **asked: Any) -> Config:
    """Describes weights: their architecture, preprocessing, classes and origin.

    A published name is only looked up, and nothing is downloaded. From a directory of weights or a training
    run only the description is read.

    Args:
      source: anything that `load` opens.
      model: name of the architecture, where the tensors of a file leave a choice.
      **asked: `key`, `prefix`, `ema`, `approximate`, `drop_head`: see `Asked`.

    Raises:
      FlaxnetsError: no such source, or a damaged one.

    Examples:
      >>> config = flaxnets.config('resnext50_32x4d.fb_swsl_ig1b_ft_in1k')
      >>> config.name, config.num_classes, config.weights.licence
      ('resnext50_32x4d', 1000, 'cc-by-nc-4.0')
      >>> config.preprocess.mean
      (0.485, 0.456, 0.406)
    """
    wanted = Asked(model, **asked)
    if is_published_name(source):
        wanted.refuse(source, _PUBLISHED)
        found = zoo.config(os.fspath(source))
        zoo.check_name(source, model, found.name)
        return found
    return _opened(source, wanted)[0]


def transform(
    source: str | os.PathLike[str] | Config | Preprocess,
    *,
    model: str | None = None,
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
    **asked: Any,
) -> Transform:
    """Makes the function that turns an image into exactly the array that weights expect.

    Args:
      source: anything that `load` opens, a `Config` or a `Preprocess`.
      model: as in `config`.
      exif: turn the picture as its EXIF orientation says; timm and torchvision do not.
      max_pixels: images with more pixels are refused before they are decoded.
      **asked: as in `config`.

    Returns:
      A `flaxnets.images.transforms.Transform`. Called with a path, a Pillow image or an array, it gives
      float32 [height, width, in_chans], normalised.

    Raises:
      FlaxnetsError: no such source, a damaged one, or weights that expect images which cannot be prepared.

    Examples:
      >>> prepare = flaxnets.transform(flaxnets.Preprocess(size=224, crop_pct=0.95))
      >>> images = prepare('photo.jpg')[None]
      >>> images.shape, images.dtype
      ((1, 224, 224, 3), dtype('float32'))
    """
    if isinstance(source, Preprocess):
        return Transform(source, exif=exif, max_pixels=max_pixels)
    found = source if isinstance(source, Config) else config(source, model=model, **asked)
    return Transform(found.preprocess, found.in_chans, exif, max_pixels)


def load(
    source: str | os.PathLike[str],
    num_classes: int | None = None,
    in_chans: int | None = None,
    *,
    model: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[ResNet, weights.Variables]:
    """Loads weights: a net and its variables.

    Args:
      source: a directory that `python -m convert` wrote; a published name, which is downloaded and
        converted once; a training run; or anything else that `python -m convert` opens: a `.pth` or
        `.safetensors` file, a folder of the Hugging Face hub, `hf-hub:org/repository`, a URL. Files and
        folders may be in a bucket (`gs://BUCKET/weights`).
      num_classes: None keeps the classifier of the weights; another number than theirs starts a new one.
      in_chans: None keeps the weights' input channels; weights for 3 are adapted to any other number.
      model: name of the architecture, where the tensors leave a choice; refused if they contradict it.
      seed: seed of the random numbers of a new classifier.
      **options: `key`, `prefix`, `ema`, `approximate`, `drop_head`, which choose among what a file holds
        (see `Asked`), and the options of `create`.

    Returns:
      The Flax module, and {'params': ..., 'batch_stats': ...} as JAX arrays for `model.apply`.

    Raises:
      FlaxnetsError: no such source, a damaged one, one that does not fit the net, bad values.

    Examples:
      >>> model, variables = flaxnets.load('weights/resnest50d', num_classes=10)
      >>> variables['params']['fc']['kernel'].shape  # of a new classifier
      (2048, 10)
      >>> model, variables = flaxnets.load('resnest50d', in_chans=1)  # published
      >>> variables['params']['conv1']['0']['kernel'].shape
      (3, 3, 1, 32)
    """
    _, net, variables = load_with_config(source, num_classes, in_chans, model=model, seed=seed, **options)
    return net, variables


def load_with_config(
    source: str | os.PathLike[str],
    num_classes: int | None = None,
    in_chans: int | None = None,
    *,
    model: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Config, ResNet, weights.Variables]:
    """`load`, and the `Config` of the weights as they are stored."""
    asked = {field.name: options.pop(field.name) for field in fields(Asked) if field.name in options}
    conf, read = _opened(source, Asked(model, **asked))
    net = build(
        conf.arch,
        conf.num_classes if num_classes is None else num_classes,
        conf.in_chans if in_chans is None else in_chans,
        **{'folded': conf.folded, **options},
    )
    return conf, net, weights.merge(read(), net, seed=seed)


def is_published_name(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a name of the zoo. A folder of that name counts only if it holds weights."""
    path = Path(source)
    if path.exists() and not path.is_dir():
        return False
    if (path / 'config.json').exists() or (path.is_dir() and runs.is_checkpoint(path)):
        return False
    try:
        zoo.resolve(os.fspath(source))
    except FlaxnetsError:
        return False
    return True


def _opened(source: str | os.PathLike[str], asked: Asked) -> tuple[Config, Callable[[], weights.Variables]]:
    """The description of weights, and a function that reads them."""
    if names_store(source):
        return _opened_in_store(source, asked)
    path = Path(source)
    if weights.is_directory(path):
        asked.refuse(source, _DIRECTORY)
        return _of_directory(path, asked.model)
    if path.is_dir() and runs.is_checkpoint(path):
        asked.refuse(source, _RUN, 'ema')
        found = runs.read_config(path)
        zoo.check_name(path, asked.model, found.name)
        return found, lambda: runs.read(path, ema=asked.ema).variables
    conversion = sibling('convert.conversion')  # imported only where a file is to be converted
    if is_published_name(source) or not path.exists():
        if is_published_name(source):
            asked.refuse(source, _PUBLISHED)
        path = conversion.converted(os.fspath(source))
        if weights.is_directory(path):
            return _of_directory(path, asked.model)
    checkpoint = conversion.open_checkpoint(path, asked.model, **asked.of_file())
    return checkpoint.config, lambda: checkpoint.variables


def _opened_in_store(
    source: str | os.PathLike[str], asked: Asked
) -> tuple[Config, Callable[[], weights.Variables]]:
    """As `_opened`, for weights in a store such as `gs://`.

    The arrays are fetched only once they are read, where the description is kept apart from them.
    """
    if weights.is_directory(source):
        asked.refuse(source, _DIRECTORY)
        conf = weights.read_config(source)
    elif runs.is_checkpoint(source):
        asked.refuse(source, _RUN, 'ema')
        conf = runs.read_config(source)
    else:
        with runs.fetched(source) as here:
            conf, _ = _opened(here, asked)
    zoo.check_name(source, asked.model, conf.name)

    def read() -> weights.Variables:
        with runs.fetched(source) as here:
            return _opened(here, asked)[1]()

    return conf, read


def _of_directory(path: Path, model: str | None) -> tuple[Config, Callable[[], weights.Variables]]:
    found = weights.read_config(path)
    zoo.check_name(path, model, found.name)
    return found, lambda: weights.read_variables(path)
