"""Which of the things in a pickle are the weights.

A training checkpoint is a dict of many things. The weights are under a well-known key, or they are
the dict itself; a choice is always stated, and never made between two equally good candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.errors import CkptError, FormatError, UnsafeError
from flamingo_ckpt.formats.pickle_nodes import walk
from flamingo_ckpt.formats.torch_nodes import (
    Census,
    describe,
    entries,
    is_tensor,
    state_entries,
    unknown_class,
)
from flamingo_ckpt.formats.torch_objects import TorchObjects
from flamingo_ckpt.tensors import Beside, TensorInfo, escape

#: In order of preference.
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "module")
#: Averages of the weights: taken when there is nothing else, or when `--wrapper-key` asks.
EMA_KEYS = frozenset(
    """
    ema ema_model ema_model_state_dict ema_state_dict model_ema model_ema_state_dict module_ema
    state_dict_ema teacher
    """.split()
)
#: Never weights, even where they hold tensors under text keys.
_NOT_WEIGHTS = ("optim", "sched", "scaler", "grad", "rng", "random_state", "hyper_parameters")
_MAX_DEPTH = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chosen weights.

    Attributes:
        key: path of the wrapper, dotted; None for a bare state dict.
        tensors: in file order.
        beside: everything else.
        unknown_classes: classes of inert objects beside the weights.
    """

    key: str | None
    tensors: tuple[TensorInfo, ...]
    beside: tuple[Beside, ...]
    unknown_classes: tuple[str, ...]


@dataclass(slots=True)
class _Candidate:
    path: tuple[str, ...]
    node: Any

    @property
    def key(self) -> str:
        return ".".join(self.path)


def select_weights(
    root: Any, objects: TorchObjects, wrapper_key: str | None, where: str
) -> Selection:
    """Find the state dict in the node graph of a pickle.

    Raises:
        CkptError: FC201 no tensors, FC207 several equally good candidates or no such key.
        UnsafeError: FC502 where a tensor hangs below an unknown class.
    """
    if is_tensor(root):
        lone = objects.tensor(root, "tensor")
        return Selection(key=None, tensors=(lone,) if lone else (), beside=(), unknown_classes=())
    census = Census(where)
    chosen = _choose(root, wrapper_key, census, where)
    tensors, inside = _read(chosen, objects, census, where)
    outside = _siblings(root, chosen.path, census)
    return Selection(
        key=chosen.key if chosen.path else None,
        tensors=tensors,
        beside=tuple(inside + outside),
        unknown_classes=tuple(_unknown_classes(root)),
    )


def _choose(root: Any, wrapper_key: str | None, census: Census, where: str) -> _Candidate:
    if wrapper_key is not None:
        return _named(root, wrapper_key, where)
    found = _candidates(_Candidate((), root), 0, set())
    if not found:
        raise _nothing(root, census, where)
    best = min(_rank(candidate) for candidate in found)
    chosen = [candidate for candidate in found if _rank(candidate) == best]
    if len(chosen) > 1:
        listed = ", ".join(
            f"`{escape(one.key) or '(top level)'}` ({_num_direct(one.node)} tensors)"
            for one in chosen[:10]
        )
        raise CkptError(
            f"{len(chosen)} parts of the file could be the weights: {listed}",
            code="FC207",
            where=where,
            hint=f"name one: `--wrapper-key {escape(next(c.key for c in chosen if c.path))}`",
        )
    _refuse_better_unknown(root, best, census, where)
    return chosen[0]


def _refuse_better_unknown(root: Any, best: tuple[int, ...], census: Census, where: str) -> None:
    """A pickled module under `model` must not be passed over silently for an average beside it."""
    for key, value in entries(root) or []:
        # The type first: a key may be a structure whose comparison never ends.
        if type(key) is not str or key not in WRAPPER_KEYS:
            continue
        if (WRAPPER_KEYS.index(key),) >= best:
            continue
        unknown = unknown_class(value)
        if unknown and census.count(value):
            raise UnsafeError(
                f"`{key}` is an object of the class `{escape(unknown)}` with tensors in it",
                code="FC502",
                where=where,
                hint="save its `state_dict()`, or choose another part with `--wrapper-key KEY`",
            )


def _rank(candidate: _Candidate) -> tuple[int, ...]:
    """Lower is better; compared level by level, so that `state_dict` beats `model.state_dict`."""
    if not candidate.path:
        return (len(WRAPPER_KEYS),)
    return tuple(_rank_of(key) for key in candidate.path)


def _rank_of(key: str) -> int:
    if key in WRAPPER_KEYS:
        return WRAPPER_KEYS.index(key)
    return len(WRAPPER_KEYS) + (key in EMA_KEYS)


def _candidates(at: _Candidate, depth: int, seen: set[int]) -> list[_Candidate]:
    """Mappings that hold tensors directly under text keys, outermost first, each once."""
    if depth > _MAX_DEPTH or id(at.node) in seen:
        return []
    seen.add(id(at.node))
    pairs = entries(at.node)
    if pairs is None:
        return []
    named = [(key, value) for key, value in pairs if type(key) is str]
    own: list[_Candidate] = []
    if _num_direct(at.node):
        # Weights below weights are part of them, except under a key that says otherwise.
        own = [at]
        named = [(key, value) for key, value in named if _is_wrapper(key)]
    # The best key first: a dict that stands under two keys is known by the first.
    below: list[_Candidate] = []
    for key, value in sorted(named, key=lambda pair: _rank_of(pair[0])):
        if not _is_training_state(key):
            below += _candidates(_Candidate((*at.path, key), value), depth + 1, seen)
    return own + below


def _is_wrapper(key: str) -> bool:
    return key in WRAPPER_KEYS or key in EMA_KEYS


def _is_training_state(key: str) -> bool:
    return any(word in key.lower() for word in _NOT_WEIGHTS)


def _num_direct(node: Any) -> int:
    pairs = entries(node) or []
    return sum(1 for key, value in pairs if type(key) is str and is_tensor(value))


def _named(root: Any, wrapper_key: str, where: str) -> _Candidate:
    node: Any = root
    path: tuple[str, ...] = ()
    rest = wrapper_key
    while rest:
        step = _longest_key(node, rest)
        if step is None:
            known = [key for key, _ in entries(node) or [] if type(key) is str]
            raise CkptError(
                f"there is no `{escape(rest)}` in the file",
                code="FC207",
                where=where,
                hint="it holds: " + ", ".join(f"`{escape(key)}`" for key in known[:10]),
            )
        key, node = step
        path, rest = (*path, key), rest[len(key) + 1 :]
    if not _num_direct(node):
        raise CkptError(
            f"`{escape(wrapper_key)}` holds no tensors: it is a {describe(node)}",
            code="FC201",
            where=where,
        )
    return _Candidate(path, node)


def _longest_key(node: Any, rest: str) -> tuple[str, Any] | None:
    """The longest key that `rest` is, or begins with before a dot."""
    fitting = [
        (key, value)
        for key, value in entries(node) or []
        if type(key) is str and key and (rest == key or rest.startswith(key + "."))
    ]
    return max(fitting, key=lambda pair: len(pair[0]), default=None)


def _read(
    chosen: _Candidate, objects: TorchObjects, census: Census, where: str
) -> tuple[tuple[TensorInfo, ...], list[Beside]]:
    tensors: list[TensorInfo] = []
    beside: list[Beside] = []
    seen: set[str] = set()
    for key, value in entries(chosen.node) or []:
        name = key if type(key) is str else describe(key)
        tensor = objects.tensor(value, name)
        if type(key) is not str:
            if tensor is not None:
                raise FormatError(
                    f"a tensor has the name {escape(name)}, which is not text",
                    code="FC110",
                    where=where,
                )
        elif name in seen:
            raise FormatError(
                f"two entries of the state dict are named `{escape(name)}`",
                code="FC104",
                where=where,
                key=name,
            )
        seen.add(name)
        if tensor is not None:
            tensors.append(tensor)
        else:
            beside.append(_inside(chosen, name, value, census, where))
    for key, value in state_entries(chosen.node):
        name = key if type(key) is str else describe(key)
        beside.append(Beside(path=_join(chosen.path, name), kind=describe(value)))
    return tuple(tensors), beside


def _inside(chosen: _Candidate, name: str, value: Any, census: Census, where: str) -> Beside:
    """An entry of the state dict that is no tensor: listed; tensors in it must not be lost."""
    num_tensors = census.count(value)
    if num_tensors and not chosen.path and (_is_training_state(name) or name in EMA_KEYS):
        return Beside(path=name, kind=describe(value), num_tensors=num_tensors)
    if num_tensors:
        unknown = unknown_class(value)
        if unknown:
            raise UnsafeError(
                f"{num_tensors} tensors under `{escape(name)}` depend on the unknown class "
                f"`{escape(unknown)}`",
                code="FC502",
                where=where,
                key=name,
                hint="save plain tensors: `torch.save(model.state_dict(), ...)`",
            )
        raise CkptError(
            f"`{escape(name)}` among the weights is a {describe(value)} that holds {num_tensors} "
            "tensors: the state dict is not flat",
            code="FC207",
            where=where,
            key=name,
            hint=f"choose what to take: `--wrapper-key {escape(_join(chosen.path, name))}`",
        )
    return Beside(path=_join(chosen.path, name), kind=describe(value))


def _siblings(root: Any, path: tuple[str, ...], census: Census) -> list[Beside]:
    """What lies beside the path that leads to the weights."""
    beside: list[Beside] = []
    node = root
    for depth, step in enumerate(path):
        following = None
        found = False
        for key, value in entries(node) or []:
            if type(key) is str and key == step:
                if found:  # a dict keeps the last, and whoever reads the pickle may not
                    raise FormatError(
                        f"two entries are named `{escape(step)}`", code="FC104", where=census.where
                    )
                following, found = value, True
                continue
            name = key if type(key) is str else describe(key)
            beside.append(
                Beside(
                    path=_join(path[:depth], name),
                    kind=describe(value),
                    num_tensors=census.count(value),
                )
            )
        node = following
    return beside


def _join(path: tuple[str, ...], name: str) -> str:
    return ".".join((*path, name))


def _unknown_classes(root: Any) -> list[str]:
    return sorted({name for node in walk(root) if (name := unknown_class(node))})


def _nothing(root: Any, census: Census, where: str) -> CkptError:
    unknown = unknown_class(root)
    num_tensors = census.count(root)
    if num_tensors and unknown:
        return UnsafeError(
            f"the file is one object of the class `{escape(unknown)}` with {num_tensors} tensors "
            "in it, not a state dict",
            code="FC502",
            where=where,
            hint="where that class is installed: `torch.save(model.state_dict(), ...)`",
        )
    if num_tensors:
        classes = _unknown_classes(root)
        if classes:
            return UnsafeError(
                f"its {num_tensors} tensors hang below unknown classes: "
                + ", ".join(f"`{escape(name)}`" for name in classes[:10]),
                code="FC502",
                where=where,
                hint="save the state dict alone: `torch.save(model.state_dict(), ...)`",
            )
        return CkptError(
            f"none of its {num_tensors} tensors is in a dict under a text key",
            code="FC201",
            where=where,
            hint="name the part that holds the weights: `--wrapper-key KEY`",
        )
    return CkptError(
        f"it holds no tensors, only: {describe(root)}",
        code="FC201",
        where=where,
        hint="is it the file that was meant? `torch.save(model.state_dict(), ...)` saves weights",
    )
