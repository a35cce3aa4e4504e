"""Chooses among several nets in a file, by what they are called and whether they hold the same numbers.

Trainings save several sets of tensors with the names of one net: averaged beside trained weights, the two
encoders of self-supervised training, a teacher and its student, and an optimizer's state of each parameter.
Where neither names nor numbers tell which is meant, the user is asked.

References: MoCo's `builder.py`, lucidrains' `byol_pytorch`, DINO's `main_dino.py`, `torch.optim`'s states.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from flaxnets.errors import CheckpointError
from flaxnets.words import count, plain, some

from .anchors import Place, bare_names

# Usual keys of averaged and of trained weights. Where a file has several of either, the first here is taken.
_AVERAGED = ('state_dict_ema', 'model_ema', 'ema_state_dict')
_TRAINED = ('state_dict', 'model')
_KNOWN = (*_AVERAGED, *_TRAINED)

# Words in the keys and prefixes of averages, and of what is trained beside one.
_WORDS_AVERAGED = frozenset(['ema', 'swa', 'shadow', 'polyak'])
_WORDS_MEAN = frozenset(['averaged', 'average', 'avg'])  # averages too, but not beside a word of the next set
_WORDS_MEASURED = frozenset(['acc', 'accuracy', 'loss', 'metric', 'score'])
AVERAGED_WORDS = _WORDS_AVERAGED | _WORDS_MEAN
_WORDS_TRAINED = frozenset(['student', 'online', 'training', 'current', 'raw', 'query'])

# Words in the names of the two encoders of self-supervised training (MoCo, BYOL): of the momentum encoder,
# which is not used afterwards, and of the trained one. 'momentum_encoder' stands beside 'encoder' or
# 'base_encoder'.
_ENCODERS = tuple(
    (frozenset(slow.split()), frozenset(fast.split()))
    for slow, fast in (
        ('encoder k', 'encoder q'),
        ('encoder key', 'encoder query'),
        ('target', 'online'),
        ('momentum encoder', 'encoder'),
        ('momentum backbone', 'backbone'),
        ('momentum net', 'net'),
    )
)
# Words in the names of an optimizer's state, which has the net's names and shapes and is no net.
_OPTIMIZER = tuple(
    frozenset(words.split())
    for words in (
        'optim',
        'optimizer',
        'optimizers',
        'exp avg',
        'momentum buffer',
        'momentum buffers',
        'square avg',
        'grad',
        'grads',
        'gradients',
    )
)
# Names of tensors that tell self-distillation (DINO), where the teacher is an average of its student.
_SELF_DISTILLED = re.compile(r'(?:^|\.)(?:dino_|ibot_)?head\.(?:mlp|last_layer)\.')

_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')
_MOST_NETS = 32  # in a file with more, none is chosen by role: the user is asked


@dataclass(eq=False)
class Net:
    """One of the nets in what was saved.

    Attributes:
      path: the keys that lead to its state dict.
      above: the containers that these are keys of, the outermost first.
      state: the state dict, with whatever else is in it.
      place: where in the state dict the net is.
      scope: the shortest prefix that only this net has among the nets of the same state dict. It is the net's
        own prefix, or a part of it, and also covers a head beside the net.
      role: 'averaged', 'trained', 'momentum' or '' (unknown), by what the net is called.
    """

    path: tuple[Any, ...]
    above: tuple[Any, ...]
    state: Mapping[Any, Any]
    place: Place
    scope: str = ''
    role: str = ''

    @property
    def key(self) -> str:
        """`path` as one text: 'state.model'."""
        return label(self.path)

    @property
    def called(self) -> str:
        """What messages call it."""
        prefix = plain(self.place.prefix) if self.place.prefix else ''
        return f'{self.key} {prefix}'.strip() or 'the file'

    @property
    def steps(self) -> list[Any]:
        """The keys that lead to it, followed by the parts of its prefix."""
        return [*self.path, *self.place.prefix.split('.')]

    @cached_property
    def around(self) -> dict[Any, Any]:
        """The items of all mappings in `above` as one; of equal keys the nearest to the net counts."""
        around: dict[Any, Any] = {}
        for level in self.above:
            around |= level if isinstance(level, Mapping) else {}
        return around

    @property
    def is_mmengines(self) -> bool:
        """Whether it is one of the two sets of weights that mmengine's EMAHook exchanges when it saves."""
        parent = self.above[-1] if self.above else None
        if not isinstance(parent, Mapping):
            return False
        averaged = parent.get('ema_state_dict')
        return holds_tensors(averaged) and 'steps' in averaged and holds_tensors(parent.get('state_dict'))

    @cached_property
    def words(self) -> list[frozenset[str]]:
        """The words of each of its steps."""
        return [words_of(step) for step in self.steps]

    @cached_property
    def body(self) -> dict[str, Any]:
        """Its tensors by their names within the net, the classifier left out."""
        return self.place.body(self.state)

    @cached_property
    def beside(self) -> dict[tuple[int, str], Any]:
        """What else in the state dict belongs to this net, such as its classifier.

        The key is (levels, name): how many parts of the net's prefix lie between the net and this tensor's
        level, and the tensor's name on that level.
        """
        out = {}
        outer = list(enumerate(reversed(_heads(self.place.prefix))))
        for written, name in self.place.beside(bare_names(self.state)).items():
            if name.startswith(self.scope):
                off, prefix = next((n, prefix) for n, prefix in outer if name.startswith(prefix))
                out[off, name[len(prefix) :]] = self.state[written]
        return out


class AmbiguousError(CheckpointError):
    """A file holds several nets. `choices` are the keywords for `open_checkpoint` that take each."""

    def __init__(self, message: str, choices: Sequence[Mapping[str, str]]) -> None:
        super().__init__(message)
        self.choices = tuple(choices)


def ambiguous(problem: str, nets: Sequence[Net]) -> AmbiguousError:
    """The error that lists the nets, each with the keywords that take it."""
    choices = _choices(nets)
    words = [
        ' and '.join(f'{name}={value!r}' for name, value in choice.items()) or net.called
        for net, choice in zip(nets, choices, strict=True)
    ]
    listed = f'it holds {count(len(nets), "net")}, which are taken by {some(words)}'
    return AmbiguousError(f'{problem}: {listed}', choices)


def label(path: Iterable[Any]) -> str:
    """The keys that lead to something as one text, safe to print: 'state.model'."""
    return '.'.join(plain(step) if isinstance(step, str) else str(step) for step in path)


def words_of(step: object) -> frozenset[str]:
    """'EMACallback' -> ema, callback; 'model_ema' -> model, ema."""
    found = re.findall('[A-Z]+(?![a-z])|[A-Z]?[a-z]+', step[:200]) if isinstance(step, str) else ()
    return frozenset(word.lower() for word in found)


def holds_tensors(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether a value is a mapping with a tensor directly in it."""
    return isinstance(value, Mapping) and any(isinstance(leaf, np.ndarray) for leaf in value.values())


def scopes(places: Sequence[Place]) -> list[str]:
    """The scope (`Net.scope`) of each of the nets in one state dict."""
    shared = Counter(head for place in places for head in _heads(place.prefix))
    unshared = ([head for head in _heads(place.prefix) if shared[head] == 1] for place in places)
    alone = len(places) == 1
    return ['' if alone else [*own, place.prefix][0] for own, place in zip(unshared, places, strict=True)]


def of_other_nets(net: Net, nets: Iterable[Net]) -> set[str]:
    """The names in a net's state dict that belong to another net: their longest scope is the other's."""
    within = {other.scope for other in nets if other.state is net.state}
    return {
        name
        for name, clean in bare_names(net.state).items()
        if next((head for head in reversed(_heads(clean)) if head in within), net.scope) != net.scope
    }


def _heads(name: str) -> list[str]:
    """'a.b.c' -> '', 'a.', 'a.b.'."""
    return ['', *(name[: dot.end()] for dot in re.finditer(r'\.', name))]


# Roles.


def split_by_role(nets: Sequence[Net]) -> tuple[list[Net], list[Net]]:
    """Splits the nets of a file into real ones, with their roles filled in, and states of optimizers."""
    aside = [net for net in nets if any(kept <= words for kept in _OPTIMIZER for words in net.words)]
    kept = [net for net in nets if net not in aside]
    if len(kept) <= _MOST_NETS:
        # A name that all of them have tells nothing.
        common = frozenset.intersection(*(frozenset(net.steps) for net in kept)) if len(kept) > 1 else ()
        for net in kept:
            net.role = _role(net, common)
        for net in kept:
            if net.role == 'teacher':
                net.role = 'averaged' if _is_average_of_student(net, kept) else ''
            elif net.role == 'momentum' and not any(are_encoders(net, fast) for fast in kept):
                net.role = ''
    return sorted(kept, key=lambda net: _KNOWN.index(net.key) if net.key in _KNOWN else len(_KNOWN)), aside


def _role(net: Net, common: Iterable[object]) -> str:
    """The role of a net, 'teacher' for now included, by the innermost of its names that tells one."""
    last: Any = net.path[-1] if net.path else None
    if net.is_mmengines:
        return {'state_dict': 'averaged', 'ema_state_dict': 'trained'}.get(last, '')
    if last == 'state_dict' and holds_tensors(net.around.get('current_model_state')):
        return 'averaged'  # Lightning's WeightAveraging exchanges the two when it saves
    for step, words in zip(reversed(net.steps), reversed(net.words), strict=True):
        if step in common:
            continue
        if words & _WORDS_TRAINED:
            return 'trained'
        if words & _WORDS_AVERAGED or (words & _WORDS_MEAN and not words & _WORDS_MEASURED):
            return 'averaged'
        if 'teacher' in words:
            return 'teacher'
        if any(slow <= words for slow, _ in _ENCODERS):
            return 'momentum'
    return ''


def _is_average_of_student(net: Net, nets: Sequence[Net]) -> bool:
    """Whether a teacher is an average of its student, by what the file says of it.

    In plain distillation it is another net, also where that has the same shapes.
    """
    if not any('student' in words for other in nets for words in other.words):
        return False
    args = net.around.get('args')
    args = args if isinstance(args, Mapping) else {}
    return (
        any(words & {'momentum', 'mean'} for words in net.words)
        or any(words_of(key) & {'ema', 'dino'} for key in net.around)
        or any({'momentum', 'teacher'} <= words_of(key) for key in args)
        or any(_SELF_DISTILLED.search(name) for name in net.state if isinstance(name, str))
    )


def are_encoders(slow: Net, fast: Net) -> bool:
    """Whether two nets are the two encoders of self-supervised training, by their names and shapes."""
    called = slow is not fast and any(
        any(first <= words for words in slow.words)
        and any(second <= words and not first <= words for words in fast.words)
        for first, second in _ENCODERS
    )
    return called and _same_net(slow, fast)


def _same_net(averaged: Net, trained: Net) -> bool:
    """Whether two nets have the same names and shapes; an average may lack BatchNorm's statistics."""
    first, second = averaged.body, trained.body
    missing = [name for name in second if name not in first]
    return all(name.endswith(_STATISTICS) for name in missing) and all(
        name in second and np.shape(tensor) == np.shape(second[name]) for name, tensor in first.items()
    )


# The choice.


def choose(
    nets: Sequence[Net], aside: Sequence[Net], ema: bool, key: str | None, prefix: str | None
) -> tuple[Net, Net | None, bool]:
    """The net that is meant.

    Args:
      nets, aside: what `split_by_role` gives, at least one net.
      ema, key, prefix: as `convert.names.wrappers.unwrap` takes them.

    Returns:
      The net; its counterpart, if it has one (the trained weights of an average or the reverse, the other of
      two encoders); and whether the net was chosen over its counterpart by their roles.

    Raises:
      AmbiguousError: no net is at that key and prefix, or several are and nothing tells which is meant.
    """
    found = list(nets)
    if key is not None or prefix is not None:
        found = _at(nets, key, prefix) or _at(aside, key, prefix)
        if not found:
            asked = [f'{n}={v!r}' for n, v in (('key', key), ('prefix', prefix)) if v is not None]
            raise ambiguous(f'has no net at {", ".join(asked)}', [*(nets or aside)])
    elif not nets:
        raise ambiguous('holds only what an optimizer keeps of a net, by its names', aside)
    elif not ema and all(net.role == 'averaged' for net in nets):
        raise CheckpointError(
            f'holds averaged weights only ({nets[0].called}), and ema=False asks for others'
        )
    chosen = _by_role(found, ema) if len(found) <= _MOST_NETS else None
    if chosen is None and len(found) <= _MOST_NETS:
        chosen = _by_role(_without_twins(found), ema)
    if chosen is None:
        raise ambiguous('no telling which net is meant', found)
    net, other = chosen
    return net, other or _other(net, nets), other is not None


def _at(nets: Sequence[Net], key: str | None, prefix: str | None) -> list[Net]:
    """Those of the nets that the user means by `key` and `prefix`."""
    found = list(nets)
    if key is not None:
        exact = [net for net in found if net.key == key]
        below = [net for net in found if net.key.startswith(f'{key}.')]
        found = exact or below or [net for net in found if net.key.endswith(f'.{key}')]
    if prefix is None:
        return found
    wanted = prefix.rstrip('.')
    return [n for n in found if wanted in (n.place.prefix.rstrip('.'), n.place.prefix_in_file.rstrip('.'))]


def _by_role(nets: Sequence[Net], ema: bool) -> tuple[Net, Net | None] | None:
    """The net to take and its counterpart, by their roles; None if the roles do not tell."""
    if len(nets) == 1:
        return nets[0], None
    fast = [net for net in nets if net.role != 'momentum']
    if len(fast) == 1:
        return fast[0], next(net for net in nets if net is not fast[0])
    averaged = _preferred([net for net in fast if net.role == 'averaged'], _AVERAGED)
    trained = _preferred([net for net in fast if net.role != 'averaged'], _TRAINED)
    if averaged is None or trained is None or not _same_net(averaged, trained):
        return None
    return (averaged, trained) if ema else (trained, averaged)


def _other(net: Net, nets: Sequence[Net]) -> Net | None:
    """A net's counterpart among all nets: the other of two encoders, or an average's trained weights."""
    for other in nets:
        if net.role == 'momentum' and are_encoders(net, other):
            return other
        if other.role == 'momentum' and net.role != 'momentum' and are_encoders(other, net):
            return other
    if net.role != 'averaged':
        return None
    trained = _preferred([other for other in nets if other.role not in ('averaged', 'momentum')], _TRAINED)
    return trained if trained and _same_net(net, trained) else None


def _preferred(nets: Sequence[Net], keys: Sequence[str]) -> Net | None:
    """The only net, or the one under the first of the keys that is there; None if neither tells."""
    if len(nets) == 1:
        return nets[0]
    by_key = {net.key: net for net in nets}
    if len(by_key) < len(nets) or '' in by_key:
        return None
    return next((by_key[key] for key in keys if key in by_key), None)


def _without_twins(nets: Sequence[Net]) -> list[Net]:
    """Leaves one of the nets that hold the same numbers: the one with the most tensors."""
    kept: list[Net] = []
    for net in nets:
        i = next((i for i, other in enumerate(kept) if _equal(net, other)), None)
        if i is None:
            kept.append(net)
            continue
        roles = {net.role, kept[i].role} - {''}
        larger = max(kept[i], net, key=lambda twin: len(twin.state))
        kept[i] = replace(larger, role=roles.pop() if len(roles) == 1 else '')
    return kept


def _equal(first: Net, second: Net) -> bool:
    """Whether two nets hold the same numbers; one may have more beside the net (a head, a counter)."""
    a, b = first.beside, second.beside
    return (
        first.body.keys() == second.body.keys()
        and (a.keys() <= b.keys() or b.keys() <= a.keys())
        and _agree(first.body, second.body)
        and _agree(a, b)
    )


def _agree(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> bool:
    """Whether two mappings hold the same numbers under the keys that both have."""
    return all(_same_numbers(a[key], b[key]) for key in a.keys() & b.keys())


def _same_numbers(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = (np.ascontiguousarray(array).view(np.uint8) for array in (a, b))
    return bool(np.array_equal(first, second))


def _choices(nets: Sequence[Net]) -> list[dict[str, str]]:
    """For each net the keywords that choose it; only those that are needed to tell them apart."""
    keys, prefixes = Counter(net.key for net in nets), {net.place.prefix for net in nets}
    by_key = len(keys) > 1 and '' not in keys
    out = []
    for net in nets:
        choice = {'key': net.key} if by_key else {}
        if len(prefixes) > 1 and (not by_key or keys[net.key] > 1):
            choice['prefix'] = net.place.prefix
        out.append(choice)
    return out
