"""Which neurons to take: how far an SFormer is from its source, and what it fires, over many configs.

Nothing here reads labels. An SFormer is compared with its source on images that calibration did not see.
"""
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from ..data import ImageRequest
from ..errors import SFormerError, first_line, needed_packages
from ..files import Json, locked, state_hash
from ..layers.watch import watch_spikes
from ..neurons import CODINGS, FitConfig, SFNConfig, Spikes
from ..neurons.coding import count_all_spikes
from .changes import network_inside
from .convert import all_tokens, calibration_batches, convert

if TYPE_CHECKING:
    import optuna

__all__ = [
    'Bench', 'Point', 'SWEPT_LEVELS', 'SILENCES', 'is_search_journal', 'need_optuna', 'pareto_front', 'recommended',
    'search', 'sweep',
]

SWEPT_LEVELS = (2, 4, 8, 16, 32, 63)
SILENCES = (0.001, 0.003, 0.01, 0.03, 0.1)  # prices of activity that are tried without a search
SILENCE_RANGE, SCALE_RANGE = (1e-4, 0.3), (0.5, 1.5)
BENCH_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Point:
    """An SFormer beside its source.

    Args:
        config: How its neurons fire.
        origin: What led to it: `sweep`, `closed form`, `search` or `lambda`.
        error: Relative error of its logits (of all tokens, without a classifier).
        agreement: Share of images on which it predicts what its source does, in [0, 1]; None without a classifier.
        activity: Share of neurons that fire.
        unary: Unary spikes per neuron.
        binary: Binary spikes per neuron.
    """
    config: SFNConfig
    origin: str
    error: float
    agreement: float | None
    activity: float
    unary: float
    binary: float


class Bench:
    """Converts one source with many configs, and compares each SFormer with it.

    Args:
        source: Network, or an SFormer that stands for its source.
        calibration: Images that thresholds are fitted to, (B, C, H, W), normalised.
        images: Other images, likewise, that SFormers are compared on.
        fit: How thresholds are fitted.

    Raises:
        SFormerError: If there are no images, or the outputs of the source on them are all zero or not finite.

    Attributes:
        seconds: What all measurements have taken.
        forward_passes: Images that went through a network so far, in calibration and comparison.
    """

    def __init__(
            self,
            source: nn.Module,
            calibration: torch.Tensor,
            images: torch.Tensor,
            fit: FitConfig = FitConfig(),
    ):
        self.source = network_inside(source).eval()
        self.calibration = calibration
        self.images = images
        self.fit = fit
        self.seconds, self.forward_passes = 0., 0
        if not len(images):
            raise SFormerError('there is no image to compare SFormers with their source on.')
        self.expected = self._outputs(self.source)
        if not 0 < self.expected.norm() < math.inf:  # nor NaN: no error is relative to that
            raise SFormerError('the source says nothing that SFormers could be compared by: its outputs are all zero, '
                               'or not finite. Is its head trained?')

    @classmethod
    def open(
            cls,
            model: Any,
            wanted: ImageRequest,
            num_calibration: int,
            batch_size: int,
    ) -> tuple['Bench', Json]:
        """A bench for the source of an SFormer, and what a record says of its images.

        Args:
            model: The SFormer.
            wanted: All images.
            num_calibration: How many of them are to calibrate with.
            batch_size: Images per batch that are read.
        """
        batches, used, _ = calibration_batches(model, wanted, batch_size, 'Reading')
        images = torch.cat([*batches])
        # the data may be sorted
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(wanted.seed))]
        bench = cls(model, images[:num_calibration], images[num_calibration:],
                    model.conversion.fit if model.conversion else FitConfig())
        return bench, dict(used, num_images=len(bench.images), num_calibration=num_calibration)

    @torch.inference_mode()
    def _outputs(self, network: Any) -> torch.Tensor:
        parameter = next(network.parameters())
        self.forward_passes += len(self.images)
        return torch.cat([
            (network(batch) if network.num_classes else all_tokens(network, batch)).float().cpu()
            for batch in self.images.to(parameter.device, parameter.dtype).split(BENCH_BATCH)])

    def measure(self, config: SFNConfig, origin: str) -> Point:
        """The SFormer of a config, beside its source."""
        start, before = time.perf_counter(), self.forward_passes
        model = convert(self.source, [self.calibration], config, self.fit)
        spikes = dict.fromkeys(CODINGS, 0)
        neurons = fired = 0

        def count(name: str, sent: Spikes) -> None:
            nonlocal neurons, fired
            neurons += sent.levels.numel()
            fired += int(sent.levels.count_nonzero())
            for coding, number in count_all_spikes(sent).items():
                spikes[coding] += number

        with watch_spikes(model, count):
            out = self._outputs(model)
        error = ((out - self.expected).norm() / self.expected.norm()).item()
        agreement = (out.argmax(-1) == self.expected.argmax(-1)).float().mean().item() if out.ndim == 2 else None
        self.forward_passes = before + len(self.images) + len(self.calibration)
        self.seconds += time.perf_counter() - start
        return Point(
            config, origin, error, agreement, fired / neurons, spikes['unary'] / neurons, spikes['binary'] / neurons)


def sweep(bench: Bench, base: SFNConfig, levels: Sequence[int] = SWEPT_LEVELS) -> Iterable[Point]:
    """SFormers with other numbers of levels N, as they are measured.

    Raises:
        SFormerError: If a fire function of the config has not that many.
    """
    configs = [dataclasses.replace(base, levels=n) for n in levels]  # before any work
    return (bench.measure(config, 'sweep') for config in configs)


def pareto_front(points: Sequence[Point], spikes: str = 'activity') -> list[Point]:
    """Points that no other one beats in both error and spikes, fewest spikes first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (getattr(p, spikes), p.error)):
        if not front or point.error < front[-1].error:
            front.append(point)
    return front


def recommended(points: Sequence[Point], max_error: float, spikes: str = 'activity') -> Point:
    """The point with the fewest spikes among those within an error; the one with the least error if there is none."""
    within = [point for point in points if point.error <= max_error]
    if within:
        return min(within, key=lambda p: (getattr(p, spikes), p.error))
    return min(points, key=lambda p: p.error)


def search(
        bench: Bench,
        base: SFNConfig,
        budget: int,
        storage: Path | None = None,
        spikes: str = 'activity',
        seed: int = 0,
        report: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Price of activity, levels and scaling factor by Bayesian optimisation of two objectives, error and spikes
    (multi-objective tree-structured Parzen estimator of Optuna, arXiv 1907.10902).

    Its first trials are what needs no search, the base config with the prices of `SILENCES`. A fifth of the budget goes
    to what the paper (arXiv 2510.23383) does: the scaling factor lambda by Bayesian optimisation of the error alone.

    Args:
        bench: What measures.
        base: Config that the others are variations of.
        budget: Trials in all, those that `storage` has already among them.
        storage: Journal of trials, which continues where it ended; None for none.
        spikes: What is to be few: `activity`, `unary` or `binary`.
        seed: Seed of the proposals.
        report: Called with each new point.

    Returns:
        Points in the order in which they were measured, the earlier ones of the journal among them.

    Raises:
        SFormerError: If the journal is damaged, of another search, or in use by one, or Optuna is missing.
    """
    if storage is None:
        return _search(bench, base, budget, None, spikes, seed, report)
    with locked(storage.with_name(f'.{storage.name}.lock'), f'another search is at work on {storage}.'):
        _leave_whole_lines(storage)
        return _search(bench, base, budget, storage, spikes, seed, report)


def _leave_whole_lines(journal: Path) -> None:
    """Cut off what a process that was killed in the middle of a line has left of it."""
    if journal.exists():
        with open(journal, 'rb+') as file:
            content = file.read()
            file.truncate(content.rfind(b'\n') + 1)


def _search(
        bench: Bench,
        base: SFNConfig,
        budget: int,
        storage: Path | None,
        spikes: str,
        seed: int,
        report: Callable[[Point], None],
) -> list[Point]:
    propose: dict[str, Callable[['optuna.Trial'], Json]] = {
        'search': lambda trial: dict(
            silence=trial.suggest_float('silence', *SILENCE_RANGE, log=True),
            levels=trial.suggest_int('levels', 2, max(SWEPT_LEVELS), log=True),
            scale=trial.suggest_float('scale', *SCALE_RANGE)),
        'lambda': lambda trial: dict(silence=0., scale=trial.suggest_float('scale', *SCALE_RANGE))}
    points: list[Point] = []
    for name, count, objectives in (
            ('search', budget - budget // 5, ('error', spikes)), ('lambda', budget // 5, ('error',))):
        study, done = _study(name, objectives, count, seed, storage, dict(
            base=dataclasses.asdict(base), fit=dataclasses.asdict(bench.fit), objectives=list(objectives),
            images=state_hash(
                dict(images=bench.images, calibration=bench.calibration, expected=bench.expected))))
        points.extend(_point(trial) for trial in done)
        for trial in done:
            bench.seconds += trial.user_attrs['seconds']
            bench.forward_passes += trial.user_attrs['forward_passes']
        closed = [dict(silence=silence, levels=base.levels, scale=base.scale) for silence in SILENCES]
        _enqueue(study, closed if name == 'search' else [], 'closed form')

        def objective(trial: 'optuna.Trial', name: str = name, objectives: tuple[str, ...] = objectives) -> list[float]:
            config = dataclasses.replace(base, **propose[name](trial))
            before = bench.seconds, bench.forward_passes
            point = bench.measure(config, trial.user_attrs.get('origin', name))
            trial.set_user_attr('point', dataclasses.asdict(point))
            trial.set_user_attr('seconds', bench.seconds - before[0])
            trial.set_user_attr('forward_passes', bench.forward_passes - before[1])
            points.append(point)
            report(point)
            return [getattr(point, key) for key in objectives]

        study.optimize(objective, n_trials=max(0, count - len(done)))
    return points


def need_optuna() -> ModuleType:
    """Optuna.

    Raises:
        SFormerError: If it is not installed.
    """
    with needed_packages('search'):
        import optuna
    return optuna


def is_search_journal(path: Path) -> bool:
    """Whether a file is one in which Optuna journals trials, a line of JSON per operation, or empty."""
    try:
        with open(path, encoding='utf-8') as file:
            line = file.readline()
            return not line or 'op_code' in json.loads(line)
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _study(
        name: str,
        objectives: Sequence[str],
        count: int,
        seed: int,
        storage: Path | None,
        identity: Json,
) -> tuple['optuna.Study', list['optuna.trial.FrozenTrial']]:
    """A study, which continues one of this identity, and the trials that it has finished. Those that it has not are
    tried again."""
    optuna = need_optuna()
    from optuna.storages.journal import JournalFileBackend
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        journal = None if storage is None else optuna.storages.JournalStorage(JournalFileBackend(str(storage)))
    except (ValueError, KeyError) as e:  # as it reads it
        raise SFormerError(f'{storage} is damaged ({first_line(e)}): choose another file, or remove it.') from e
    study = optuna.create_study(
        storage=journal, study_name=name, load_if_exists=True, directions=['minimize'] * len(objectives))
    # a sampler of the same seed would propose the same again
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), n_startup_trials=min(10, count // 2))
    if study.user_attrs.get('identity', identity) != identity:
        raise SFormerError(f'{storage} has trials of another search: choose another file, or remove it.')
    study.set_user_attr('identity', identity)
    for trial in study.trials:
        if trial.state.name == 'RUNNING':  # when the process was killed
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    for trial in study.trials:
        if trial.state.name == 'FAIL':
            _enqueue(study, [trial.params], trial.user_attrs.get('origin', name))
    return study, [trial for trial in study.trials if trial.state.name == 'COMPLETE']


def _enqueue(study: 'optuna.Study', wanted: Sequence[Json], origin: str) -> None:
    """Let values be tried next, but for those that have been, or will be. What Optuna skips are also those whose trial
    has failed."""
    kept = [trial.params or trial.system_attrs.get('fixed_params') for trial in study.trials
            if trial.state.name in ('COMPLETE', 'WAITING')]
    for values in wanted:
        if values and values not in kept:
            study.enqueue_trial(values, dict(origin=origin))


def _point(trial: 'optuna.trial.FrozenTrial') -> Point:
    point = trial.user_attrs['point']
    return Point(**{**point, 'config': SFNConfig(**point['config'])})
