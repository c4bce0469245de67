"""A scale-and-fire neuron whose two branches share their thresholds."""
from collections.abc import Mapping, Sequence
from typing import Unpack

import torch

from .config import FitConfig, SFNConfig
from .functional import level_values
from .levels import MAX_MET_LEVEL
from .scale_and_fire import FEW_LEVELS, ScaleAndFire, SiteOptions
from .statistics import CurrentStatistics
from .thresholds import exact_step, fit_counts

__all__ = ['SharedScaleAndFire']


class SharedScaleAndFire(ScaleAndFire):
    """Scale-and-fire neuron with one step for both branches, of which each has as many of 2N thresholds as its currents
    need: levels from `-counts[1]` to `counts[0]`, 2N apart.

    Currents are seldom as far on one side as on the other, least after an activation function, and thresholds that a
    branch does not need make those of the other finer. Levels that lie at most 126 apart are unsigned bytes that every
    processor multiplies exactly by weights of 8 bits, however far one branch reaches, and one step is one operation.

    Args:
        shape: As of `ScaleAndFire`.
        config: Likewise; `suits` says which ones this neuron takes.
        **kwargs: Likewise.

    Shape:
        As of `ScaleAndFire`.
    """
    counts: torch.Tensor

    def __init__(self, shape: Sequence[int], config: SFNConfig = SFNConfig(), **kwargs: Unpack[SiteOptions]):
        super().__init__(shape, config, **kwargs)
        self.register_buffer('counts', torch.full_like(self.multiplier, config.levels))
        self.step.copy_(exact_step(self.step * (self.levels[-1] / config.levels)))  # of which either branch has N

    @staticmethod
    def suits(config: SFNConfig, fire_function: str) -> bool:
        """Whether levels are so many that branches may share them, so few that they are bytes of 7 bits, all alike, and
        neither follow tokens, whose largest current is on either branch, nor cost anything."""
        return (fire_function == 'uniform' and FEW_LEVELS < config.levels <= MAX_MET_LEVEL
                and not config.token_scale and not config.silence)

    def _level_values(self) -> torch.Tensor:
        return level_values('uniform', 2 * self.config.levels - 1)

    @property
    def top_levels(self) -> torch.Tensor:
        return self.counts

    def set_state(
            self,
            step: torch.Tensor,
            multiplier: torch.Tensor | None = None,
            levels: torch.Tensor | None = None,
            center: torch.Tensor | None = None,
            gain: float = 1.,
            counts: torch.Tensor | None = None,
            **more: torch.Tensor,
    ) -> None:
        """Set fitted values and mark the neuron as calibrated.

        Args:
            step: As of `ScaleAndFire`.
            multiplier: Likewise; ones.
            levels: Likewise; 1 to 2N - 1.
            center: Likewise.
            gain: Likewise.
            counts: Thresholds of each branch, (2, *shape) integers >= 1, together 2N; N each if None.
            **more: As of `ScaleAndFire`.

        Raises:
            ValueError: As of `ScaleAndFire`.
        """
        if counts is None:
            counts = torch.full_like(self.counts, self.config.levels)
        super().set_state(step, multiplier, levels, center, gain, counts=counts, **more)

    def _rescale(self, factor: float | torch.Tensor, gain: float = 1.) -> None:
        self.set_state(self.step * factor, center=self.center, gain=self.gain.item() * gain, counts=self.counts)

    def fit(
            self,
            statistics: CurrentStatistics | None,
            config: FitConfig = FitConfig(),
            octaves: torch.Tensor | None = None,
    ) -> None:
        """Fit step, counts and centre to what was observed; arguments as of `ScaleAndFire`, without octaves."""
        if statistics is None or octaves is not None:
            raise ValueError('a neuron whose branches share thresholds is fitted to currents, each channel by itself.')
        step, counts = fit_counts(statistics, self.config.levels, self.config.initial_potential, config)
        shape = self.step.shape
        self.set_state(step.view(shape) * self.config.scale, center=statistics.center, counts=counts.view(2, *shape))

    def _divided(self, h: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        return h / threshold[0]

    def _multiplied_(self, k: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return k.mul_(values[0])

    def _fire(self, x: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        k, row = super()._fire(x, threshold)
        return k.clamp_(-self.counts[1], self.counts[0]), row

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f'{prefix}counts'] = self.counts.to(torch.uint8)

    def _problem(self, name: str, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> str:
        problem = super()._problem(name, value, state)
        if problem or value.is_meta:
            return problem
        if name == 'counts':
            if value.is_floating_point() and (value != value.round()).any():
                return 'is not an integer'
            most = 2 * self.config.levels
            if (value < 1).any() or (value.to(torch.int32).sum(0) != most).any():
                return f'must be at least 1 per branch and {most} in all'
        return ''
