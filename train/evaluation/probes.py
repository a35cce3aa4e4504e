"""The command `python -m train probe`: judges features by nearest neighbours and a linear probe.

The net's own classifier is not used. Both methods learn from the features of the data's training part and are
judged on its evaluation part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, Float64, Int
from tqdm import tqdm

from flaxnets.api import load_with_config
from flaxnets.errors import FlaxnetsError
from flaxnets.inference.features import nearest, pooled

from .. import parallel
from ..data.sources import Source, open_source
from ..step.pixels import normalise
from .feed import device_batches

Features = Float[np.ndarray, 'n d']
Labels = Int[np.ndarray, ' n']
TEMPERATURE = 0.07  # divides the cosines: Wu et al., arXiv 1805.01978, and DINO, arXiv 2104.14294
ITERATIONS = 1000  # at most, of L-BFGS, as in CLIP's probe (arXiv 2103.00020, appendix A.3)


@dataclass(frozen=True)
class Probe:
    """The outcome of a probe.

    Attributes:
      model, data: as the user named them.
      trained, judged: numbers of images that were learnt from and judged.
      features: how many features an image has.
      neighbours: how many nearest images vote.
      knn: top-1 of their vote, in percent.
      linear: top-1 of the linear classifier, in percent.
      strength: its C, the inverse of the L2 penalty's weight.
    """

    model: str
    data: str
    trained: int
    judged: int
    features: int
    neighbours: int
    knn: float
    linear: float
    strength: float

    def text(self) -> str:
        """The outcome as text for a terminal."""
        lines = [
            f'{self.model} on {self.data}: {self.features} features, {self.trained} images to learn from, '
            f'{self.judged} to be judged by',
            f'k-NN    top-1  {self.knn:6.2f} %   (k={self.neighbours}, cosine, temperature {TEMPERATURE})',
            f'linear  top-1  {self.linear:6.2f} %   (logistic regression, L2, C={self.strength:g})',
        ]
        return '\n'.join(lines)


def run(options: argparse.Namespace) -> Probe:
    """Probes a net, by the options of the command line.

    Raises:
      FlaxnetsError: no such weights or data, parts with different classes, bad values.
    """
    if jax.process_count() > 1:
        raise FlaxnetsError('a probe runs in one process, on all of its devices')
    if options.neighbours < 1 or not 0 < options.strength < np.inf:
        raise FlaxnetsError(f'k={options.neighbours} and C={options.strength:g} must be above 0')
    training = open_source(options.data, options.train_split, training=True)
    judged = open_source(options.data, options.split, training=False).among(training.classes)
    for note in dict.fromkeys((*training.notes, *judged.notes)):
        print(f'note: {note}', file=sys.stderr)
    if training.fingerprint == judged.fingerprint:
        raise FlaxnetsError('the images to judge are those to learn from: name another part of the data')
    read = reader(options)
    (known, labels), (asked, wanted) = read(training), read(judged)
    voted = vote(asked, known, labels, training.num_classes, options.neighbours)
    told = linear_probe(known, labels, training.num_classes, options.strength)(asked)
    return Probe(
        options.model,
        options.data,
        len(known),
        len(asked),
        known.shape[1],
        min(options.neighbours, len(known)),
        100 * float((voted == wanted).mean()),
        100 * float((told == wanted).mean()),
        options.strength,
    )


def reader(options: argparse.Namespace) -> Callable[[Source], tuple[Features, Labels]]:
    """A function from a source to the features and labels of its images, in its order."""
    config, model, variables = load_with_config(options.model, dtype=options.dtype)
    variables = parallel.replicate(jax.tree.map(np.asarray, variables))

    def features(variables: Any, batch: dict[str, jax.Array]) -> Any:
        images = normalise(batch['image'], config.preprocess)
        found: Any = model.apply(variables, images, method=pooled)
        own = {**{key: batch[key] for key in ('label', 'mask')}, 'features': found.astype(jnp.float32)}
        return jax.lax.all_gather(own, parallel.AXIS, tiled=True)

    step = parallel.map_eval_step(features)

    def read(source: Source) -> tuple[Features, Labels]:
        batches = device_batches(
            source, config, images=options.batch, feed=options.feed, workers=options.workers
        )
        parts, labels = [], []
        with tqdm(total=len(source), unit=' images', disable=options.quiet or None) as bar:
            for batch in batches:
                found = parallel.to_host(step(variables, parallel.shard(batch)))
                parts.append(found['features'][found['mask']])
                labels.append(found['label'][found['mask']])
                bar.update(len(labels[-1]))
        return np.concatenate(parts), np.concatenate(labels)

    return read


def vote(
    asked: Float[np.ndarray, 'n d'],
    known: Float[np.ndarray, 'm d'],
    labels: Int[np.ndarray, ' m'],
    classes: int,
    k: int,
) -> Int[np.ndarray, ' n']:
    """The class that the k nearest images vote for, each with the weight exp(cosine / 0.07).

    Args:
      asked: features of the images to judge.
      known, labels: features and classes of the images that vote.
      classes: how many classes there are.
      k: how many vote, if there are so many.

    Returns:
      Classes; of classes with equal votes the lowest.
    """
    rows, similar = nearest(asked, known, k)
    votes = np.zeros((len(asked), classes))
    # The largest similarity is subtracted first: a common factor of an image's votes, so nothing overflows.
    weights = np.exp((similar - similar[:, :1]).astype(np.float64) / TEMPERATURE)
    np.add.at(votes, (np.arange(len(asked))[:, None], labels[rows]), weights)
    return votes.argmax(1)


def linear_probe(
    known: Features, labels: Labels, classes: int, strength: float
) -> Callable[[Features], Labels]:
    """Fits a linear classifier to features: scikit-learn's `LogisticRegression(C=strength)`.

    L-BFGS minimises C times the sum of the images' cross entropies plus half the squared norm of the weights,
    without the bias.

    Args:
      known, labels: features and classes to learn from.
      classes: how many there are.
      strength: C.

    Returns:
      A function from features to classes.
    """
    features, targets = jnp.asarray(known), jnp.asarray(labels)
    shape = (known.shape[1] + 1, classes)

    @jax.jit
    def loss(flat: Float[Array, ' p']) -> tuple[Float[Array, ''], Float[Array, ' p']]:
        def value(flat: Float[Array, ' p']) -> Float[Array, '']:
            weights = flat.reshape(shape)
            logs = jax.nn.log_softmax(features @ weights[:-1] + weights[-1])
            own = jnp.take_along_axis(logs, targets[:, None], 1).sum()
            return (0.5 * (weights[:-1] ** 2).sum() / strength - own) / len(known)

        return jax.value_and_grad(value)(flat)

    def on_host(flat: Float64[np.ndarray, ' p']) -> tuple[float, Float64[np.ndarray, ' p']]:
        value, slope = loss(jnp.asarray(flat, jnp.float32))
        return float(value), np.asarray(slope, np.float64)

    start = np.zeros(shape[0] * shape[1])
    found = scipy.optimize.minimize(
        on_host, start, jac=True, method='L-BFGS-B', options={'maxiter': ITERATIONS}
    )
    weights = found.x.reshape(shape)
    return lambda asked: (asked @ weights[:-1] + weights[-1]).argmax(1)
