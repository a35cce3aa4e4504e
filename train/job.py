"""Makes what a run works with, from its settings: data, net, optimizer, numbers of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

import flaxnets
from flaxnets.api import load_with_config
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import ResNet, abstract_variables, initial_head
from flaxnets.zoo import NETS, resolve
from flaxnets.zoo.classes import ClassesError, match
from flaxnets.zoo.records import Config

from . import parallel
from .data.planes import check_channels
from .data.sources import Source, open_source, some
from .notes import Note, about_images, without_effect
from .settings import PLAIN, Settings, complete, continued, preprocess, validate
from .step.optimizer import make_optimizer
from .step.schedule import count_steps
from .step.state import TrainState, create_state, initial_variables
from .step.step import Step, make_train_step

EVALUATION = 'evaluation'  # of `Job.fingerprints`


@dataclass(frozen=True)
class Job:
    """What a run works with.

    Attributes:
      settings: complete, nothing left open; `num_classes` is the data's.
      training, evaluation: the images.
      epoch_steps, total_steps: updates of an epoch and of the whole run.
      model: as it is trained; `inference` as it is evaluated.
      optimizer: its updates are added to the parameters.
      remarks: notes on the settings, logged before the run begins.
    """

    settings: Settings
    training: Source
    evaluation: Source
    epoch_steps: int
    total_steps: int
    model: ResNet
    inference: ResNet
    optimizer: optax.GradientTransformation
    remarks: tuple[Note, ...] = ()

    @property
    def config(self) -> Config:
        """The configuration that is stored with the trained weights."""
        name = resolve(self.settings.model)[0]
        return Config(
            name,
            NETS[name],
            self.preprocess,
            num_classes=self.settings.num_classes,
            in_chans=self.settings.in_chans,
            classes=self.training.classes or None,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user of the data should know: what was left out, classes without images."""
        notes = [*self.training.notes, *self.evaluation.notes]
        for part, source in (('training', self.training), ('evaluation', self.evaluation)):
            empty = source.empty_classes()
            if empty:
                notes.append(f'{part} has no images of {len(empty)} classes: {some(empty)}')
        if self.training.num_classes == 1:
            notes.append(f'all images are of one class, {self.training.classes[0]!r}')
        if self.training.fingerprint == self.evaluation.fingerprint:
            notes.append('evaluation judges by the images of training: give another part, eval_split=')
        return tuple(dict.fromkeys(notes))

    @property
    def preprocess(self) -> Preprocess:
        """How images are normalised, and prepared for evaluation."""
        return preprocess(self.settings)

    def train_step(self) -> Step:
        """The training step of one device, to be mapped over all of them."""
        return make_train_step(
            self.model,
            self.optimizer,
            self.settings,
            self.preprocess,
            epoch_steps=self.epoch_steps,
            axis_name=parallel.AXIS,
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """What tells these images from others, for comparing at a resume."""
        return {'training': self.training.fingerprint, EVALUATION: self.evaluation.fingerprint}


def make_job(settings: Settings, earlier: Settings | None = None) -> Job:
    """Opens the data and builds the net.

    Args:
      settings: of the run; what they leave open is filled in.
      earlier: the settings that the run began with, at a resume.

    Raises:
      FlaxnetsError: bad settings, no such data, weights or net, numbers that do not fit the data or the
        devices.
    """
    validate(settings)
    if not settings.data:
        raise FlaxnetsError('data= is missing: say where the images are (--data tfds:imagenet2012)')
    training = open_source(settings.data, settings.train_split, training=True)
    evaluation = open_source(settings.data, settings.eval_split, training=False).among(training.classes)
    if settings.num_classes not in (0, training.num_classes):
        raise FlaxnetsError(
            f'num_classes={settings.num_classes}, but {settings.data} has {training.num_classes}'
        )
    given = dataclasses.replace(settings, num_classes=training.num_classes)
    expected = None if earlier else expected_images(given)
    settings = continued(given, earlier) if earlier else complete(given, expected or PLAIN)
    lost = {check_channels(source, settings.in_chans) for source in (training, evaluation)} - {None}
    epoch_steps, total_steps = count_steps(settings, len(training))
    model = make_model(settings, jax.device_count())
    optimizer = make_optimizer(settings, epoch_steps, abstract_variables(model)['params'])
    inference = make_model(dataclasses.replace(settings, remat=False), jax.device_count())
    said = [Note('note', text) for text in sorted(filter(None, lost))]
    said += [
        *about_images(given, settings, expected),
        *without_effect(settings, epoch_steps, total_steps, jax.device_count()),
    ]
    return Job(
        settings, training, evaluation, epoch_steps, total_steps, model, inference, optimizer, tuple(said)
    )


def expected_images(settings: Settings) -> Preprocess | None:
    """How the weights that a run starts from expect their images; None if it starts from random numbers.

    Raises:
      FlaxnetsError: the weights cannot be opened.
    """
    return flaxnets.config(settings.weights).preprocess if settings.weights else None


def make_model(settings: Settings, devices: int) -> ResNet:
    """The net that settings describe, with the span of its BatchNorm fitted to the devices.

    Args:
      settings: of the run.
      devices: how many devices all hosts have together.

    Raises:
      FlaxnetsError: no such net, or `batch_size`, `accumulation` or `bn_images` do not fit the devices.
    """
    s = settings
    local = s.batch_size // devices
    span = parallel.bn_span(s.bn_images, s.batch_size, s.accumulation, devices)
    if 0 < s.mix_images < local and local % s.mix_images:
        raise FlaxnetsError(
            f'mix_images={s.mix_images} does not divide the {local} images of a device; choose another'
        )
    if (s.mixup or s.cutmix) and local < 2:
        raise FlaxnetsError(
            f'mixup={s.mixup:g}, cutmix={s.cutmix:g} mix images of a device, and batch_size={s.batch_size} '
            f'gives each of {devices} devices one; take a larger batch_size or none of them'
        )
    model = flaxnets.create(
        s.model,
        s.num_classes or 1000,
        s.in_chans,
        dtype=s.dtype,
        drop_rate=s.drop_rate,
        drop_path_rate=s.drop_path_rate,
        drop_block_rate=s.drop_block_rate,
        frozen_stages=s.frozen_stages,
        freeze_bn=s.freeze_bn,
        zero_init_last=s.zero_init_last,
        remat=s.remat,
    )
    return model.clone(bn_span=span)


def abstract_state(job: Job) -> Any:
    """Shapes and dtypes of the run's state, without making any array."""
    variables = abstract_variables(job.model)
    return jax.eval_shape(lambda v: create_state(v, job.optimizer, ema=job.settings.ema_decay > 0), variables)


def initial_state(job: Job, say: Callable[[str], None] = lambda note: None) -> TrainState:
    """The state before the first step, as NumPy arrays: random, or from `settings.weights`.

    Args:
      job: the run.
      say: called with a note on what became of the weights' classifier.

    Raises:
      FlaxnetsError: the weights cannot be opened, or are those of another net.
    """
    settings = job.settings
    if settings.weights:
        config, net, variables = load_with_config(
            settings.weights, settings.num_classes, settings.in_chans, seed=settings.seed
        )
        if config.name != resolve(settings.model)[0]:
            raise FlaxnetsError(
                f'weights={settings.weights} are those of {config.name}, but model={settings.model}; '
                f'give model={config.name} or other weights'
            )
        outputs, note = _head_order(config, job.training.classes)
        say(note)
        head = variables['params']['fc']
        if outputs is not None:
            head = {leaf: array[..., outputs] for leaf, array in head.items()}
        elif config.num_classes == settings.num_classes:
            head = initial_head(net, settings.seed)  # as many classes, but others
        variables = {**variables, 'params': {**variables['params'], 'fc': head}}
    else:
        variables = initial_variables(job.model, settings.seed, settings.conv_init)
    host = jax.tree.map(np.asarray, variables)
    state = create_state(host, job.optimizer, ema=settings.ema_decay > 0)
    return jax.tree.map(np.asarray, state)


def _head_order(config: Config, classes: tuple[str, ...]) -> tuple[np.ndarray | None, str]:
    """For each class of the data its output in the weights, None if these have other classes; and a note."""
    if config.num_classes == 0:
        return None, 'the weights have no classifier: a new one'
    if config.num_classes != len(classes):
        return None, f'a new classifier, for {len(classes)} classes in place of {config.num_classes}'
    try:
        matching = match(classes, config)
    except ClassesError as error:
        return None, f'a new classifier: {error}'
    return np.array(matching.outputs), f'the classifier of the weights is kept; matched {matching.rule}'
