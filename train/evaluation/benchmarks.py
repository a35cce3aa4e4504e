"""Published test sets for nets with ImageNet's classes, by name: `imagenet-a:FOLDER`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.zoo import benchmarks as zoo
from flaxnets.zoo import imagenet
from flaxnets.zoo.records import Accuracy, Config

from ..data.sources import Source, open_source


@dataclass(frozen=True)
class Benchmark:
    """A published test set.

    Attributes:
      name: what the user calls it, and its name in `flaxnets.zoo.benchmarks`, which has published accuracies.
      title: its name and paper, for messages.
      images: how many images it has.
      subset: which of ImageNet's 1000 classes it has, as `flaxnets.zoo.imagenet.subset` names them; None for
        all. A net is judged among these alone, as in timm and in the papers.
      real: whether it is judged by the reassessed labels.
      version: the version that published accuracies are of; '' if there is only one.
      others: words in the names of folders that hold other versions.
    """

    name: str
    title: str
    images: int
    subset: str | None = None
    real: bool = False
    version: str = ''
    others: tuple[str, ...] = ()

    def is_other(self, source: Source) -> bool:
        """Whether the name of the data says that it is another version than that of published accuracies."""
        return any(word in source.name.lower() for word in self.others)


_ALL = (
    Benchmark(
        'imagenet-v2',
        'ImageNet-V2 (Recht et al., arXiv 1902.10811)',
        10_000,
        version='matched frequency',
        others=('threshold', 'top-images', 'topimages'),
    ),
    Benchmark('imagenet-a', 'ImageNet-A (Hendrycks et al., arXiv 1907.07174)', 7_500, 'ImageNet-A'),
    Benchmark('imagenet-r', 'ImageNet-R (Hendrycks et al., arXiv 2006.16241)', 30_000, 'ImageNet-R'),
    Benchmark('imagenet-sketch', 'ImageNet-Sketch (Wang et al., arXiv 1905.13549)', 50_889),
    Benchmark('imagenet-real', 'ImageNet ReaL (Beyer et al., arXiv 2006.07159)', 50_000, real=True),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
REAL_LABELS = 'real.json'  # as its authors call the file, looked for in the folder


def parse(spec: str) -> tuple[str, Benchmark | None, str]:
    """Takes `imagenet-a:FOLDER` apart.

    Returns:
      A description that `open_source` takes; the benchmark, or None if `spec` names none; its folder, or ''.

    Raises:
      FlaxnetsError: the folder is missing; no test set has this name.
    """
    name, _, folder = spec.partition(':')
    if name.startswith('imagenet-') and name not in BENCHMARKS:
        raise FlaxnetsError(f'data={spec!r}: no such test set; known are {", ".join(BENCHMARKS)}')
    if name not in BENCHMARKS:
        return spec, None, ''
    if not folder:
        raise FlaxnetsError(f'{name} needs its folder: {name}:FOLDER, with a folder for each class in it')
    return f'folder:{folder}', BENCHMARKS[name], os.path.expanduser(folder)


def open_benchmark(spec: str, split: str) -> tuple[Source, Benchmark | None, str | None]:
    """Opens data, a benchmark or not.

    Returns:
      The images; the benchmark, or None; the path of the reassessed labels in its folder, or None.

    Raises:
      FlaxnetsError: there are no such images.
    """
    plain, benchmark, folder = parse(spec)
    source = open_source(plain, split, training=False, whole=True)
    labels = os.path.join(folder, REAL_LABELS)
    return source, benchmark, labels if benchmark and benchmark.real and os.path.isfile(labels) else None


def check_classes(
    benchmark: Benchmark, source: Source, outputs: Sequence[int], places: Sequence[int] | None
) -> None:
    """Checks that data has the classes of a benchmark, and that a net has ImageNet's.

    Args:
      benchmark: what the data is said to be.
      source: the data.
      outputs: for each class of the data, the number of the net's output.
      places: for each output of the net, the number of ImageNet's class; None if they are other classes.

    Raises:
      FlaxnetsError: they have other classes, so that accuracies could not be compared with published ones.
    """
    if places is None or sorted(places) != list(range(imagenet.CLASSES)):
        raise FlaxnetsError(f"{benchmark.title} judges nets with ImageNet's 1000 classes; these are others")
    there = {places[i] for i in outputs}
    if benchmark.subset and imagenet.subset(there) != benchmark.subset:
        raise FlaxnetsError(
            f'{source.name} has {len(there)} classes, which are not the 200 of {benchmark.title}; '
            'take folder: for data of your own'
        )
    if not benchmark.subset and len(there) != imagenet.CLASSES:
        raise FlaxnetsError(
            f'{source.name} has {len(there)} classes, and {benchmark.title} has 1000; take folder: for data '
            'of your own'
        )


def notes(benchmark: Benchmark, source: Source) -> tuple[str, ...]:
    """Notes for the user: whether the data has as many images as the benchmark."""
    found = []
    if len(source) != benchmark.images:
        found.append(
            f'{source.name} has {len(source)} images, {benchmark.title} {benchmark.images}: accuracies are '
            'not comparable with published ones'
        )
    if benchmark.is_other(source):
        found.append(
            f'published accuracies are of {benchmark.title}, {benchmark.version}, not of {source.name}'
        )
    return tuple(found)


def published(benchmark: Benchmark, config: Config, source: Source) -> Accuracy | None:
    """The accuracy that is published for weights on a benchmark; None if it is not of these images."""
    accuracy = _published(benchmark, config)
    if accuracy is None or len(source) != benchmark.images or benchmark.is_other(source):
        return None
    return accuracy if config.preprocess == _measured(config, accuracy) else None


def preprocess_notes(benchmark: Benchmark, config: Config) -> tuple[str, ...]:
    """A note on how the images of the published accuracy were prepared, if it is not as these are."""
    accuracy = _published(benchmark, config)
    if accuracy is None or config.preprocess == (measured := _measured(config, accuracy)):
        return ()
    return (
        f'the accuracy that is published for {config.name} on {benchmark.title} is of images prepared '
        f'otherwise, and not shown: {measured}',
    )


def _published(benchmark: Benchmark, config: Config) -> Accuracy | None:
    return zoo.published(config.weights.name, benchmark.name) if config.weights else None


def _measured(config: Config, accuracy: Accuracy) -> Preprocess | None:
    """How the images were prepared on which the accuracy was measured; None if that is unknown."""
    assert config.weights is not None, 'its accuracy was found'
    both = (config.weights.preprocess, config.weights.test_preprocess)
    return next((prepared for prepared in both if prepared and prepared.size == accuracy.size), None)
