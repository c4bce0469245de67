"""Parameters by other names: what a family of networks calls what timm has, as a table that is read both ways."""
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from ..errors import SFormerError
from ..files import Json
from ..models.sformer import State

__all__ = ['Family', 'FamilyConfig', 'Pairs', 'without_logits']

FamilyConfig = Mapping[str, Any]
# Theirs and timm's: `*` is a stretch without dots, the same on both sides, `[i]` the i-th of three tensors that timm
# has joined, and a tuple what timm has taken apart. `**`, of what is not used, is any stretch.
Pairs = tuple[tuple[str, str | tuple[str, ...]], ...]

LOGITS = ('classifier.*', 'cls_classifier.*', 'distillation_classifier.*', 'visual_projection.*')


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks of one kind.

    Args:
        title: What it is called.
        names: Pairs of names; of several that fit, the first counts.
        unused: Names of what no image classifier reads.
        prefixes: What may stand before names.
        defaults: Fields of its config that a `config.json` may leave out.
        build: Its config, and the names in its file, to a timm model and arguments that compute the same.
        section: Field of the config of a larger model that holds the config of this one.
        zeros: Name of a tensor -> what timm has beside it, of zeros.
        follows_size: Whether transformers resizes its position embeddings to images of any size;
        antialias: and whether with antialiasing.
    """
    title: str
    names: Pairs
    build: Callable[[FamilyConfig, Collection[str]], tuple[str, Json]]
    unused: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    defaults: Json = dataclasses.field(default_factory=dict)
    section: str | None = None
    zeros: Mapping[str, str] = dataclasses.field(default_factory=dict)
    follows_size: bool = True
    antialias: bool = False

    def config(self, config: Json) -> FamilyConfig:
        """The config of this family in that of a model."""
        own = config[self.section] if self.section in config else config
        return {**self.defaults, **{key: value for key, value in own.items() if value is not None}}

    def own_name(self, name: str) -> str:
        """A name without what stands before those of the family."""
        return next((name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix)), name)

    def to_timm(self, state: State) -> State:
        """A state dict by timm's names.

        Raises:
            SFormerError: If a name is not of this family, or one of three tensors that belong together is missing.
        """
        renamed: State = {}
        parts: dict[str, dict[int, torch.Tensor]] = {}
        for name, tensor in state.items():
            own = self.own_name(name)
            if any(_match(pattern, own) for pattern in self.unused) or not tensor.numel():  # no registers, say
                continue
            found = next(((theirs, ours) for theirs, ours in self.names if _match(theirs, own)), None)
            if found is None:
                raise SFormerError(f'{name} is no parameter of a {self.title} that is known here.')
            if own in self.zeros:
                renamed[self.zeros[own]] = tensor.new_zeros(tensor.shape[0])
            theirs, ours = found
            stars = _stars(theirs, own)
            if isinstance(ours, tuple):  # a tensor of three equal parts: the first, and the others
                size = tensor.shape[0] // 3
                for target, part in zip(ours, tensor.split((size, 2 * size)), strict=True):
                    renamed[_filled(target, stars)] = part
            elif ours.endswith(']'):
                target = _filled(ours[:-3], stars)
                parts.setdefault(target, {})[int(ours[-2])] = tensor
            else:
                renamed[_filled(ours, stars)] = tensor
        for target, three in parts.items():
            if len(three) != 3:
                missing = self.from_timm(target)[next(i for i in range(3) if i not in three)]
                raise SFormerError(f'{missing} is missing beside those that {target} is joined of.')
            renamed[target] = torch.cat([three[i] for i in range(3)])
        for name in {'cls_token', 'pos_embed'} & renamed.keys():  # timm's have a batch and a token
            renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
        return renamed

    def from_timm(self, name: str) -> list[str]:
        """Names of the family, without prefix, of what timm calls `name`: several if it has joined them, none if it has
        no counterpart."""
        found = []
        for theirs, ours in self.names:
            for target in (ours if isinstance(ours, tuple) else (ours,)):
                pattern = target[:-3] if target.endswith(']') else target
                if _match(pattern, name):
                    found.append(_filled(theirs, _stars(pattern, name)))
        return found


def without_logits(state: State) -> State:
    """A state dict of transformers without what gives logits."""
    return {name: tensor for name, tensor in state.items() if not any(_match(pattern, name) for pattern in LOGITS)}


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r'\*\*', '.+').replace(r'\*', r'([^.]+)')


def _match(pattern: str, name: str) -> bool:
    return re.fullmatch(_regex(pattern), name) is not None


def _stars(pattern: str, name: str) -> list[str]:
    matched = re.fullmatch(_regex(pattern), name)
    return [*matched.groups()] if matched else []


def _filled(pattern: str, stars: list[str]) -> str:
    for star in stars:
        pattern = pattern.replace('*', star, 1)
    return pattern
