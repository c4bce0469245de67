"""Evaluation: accuracy, agreement with the source network, firing rates."""
import contextlib
import time
from typing import Any, Dict, Iterator, Optional, Union

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from .calibration import bypass_neurons
from .errors import SFormerError, UncalibratedError
from .hub import uncalibrated
from .layers import named_neurons
from .models import is_calibrated
from .neurons import ScaleAndFire
from .utils import library_versions, progress, state_hash

__all__ = ['evaluate', 'FiringRates', 'firing_rates']


class FiringRates:
    """Running firing rate per neuron site: the share of neurons that send a spike of whatever level.

    Pixels are coded directly and always fire, so the patch embedding is left out.
    """

    def __init__(self):
        self.fired: Dict[str, int] = {}
        self.total: Dict[str, int] = {}

    @contextlib.contextmanager
    def observe(self, model: nn.Module) -> Iterator[None]:
        """Count the spikes of all forward passes inside of the context."""
        def hook(name):
            def count(neuron, args, out):
                self.fired[name] = self.fired.get(name, 0) + int(torch.count_nonzero(out))
                self.total[name] = self.total.get(name, 0) + out.numel()
            return count

        handles = [neuron.register_forward_hook(hook(name))
                   for name, neuron in named_neurons(model) if isinstance(neuron, ScaleAndFire)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def per_site(self) -> Dict[str, float]:
        """Firing rate per site, in [0, 1]."""
        return {name: self.fired[name] / self.total[name] for name in self.fired}

    def mean(self) -> Optional[float]:
        """Firing rate of all neurons of the model taken together."""
        total = sum(self.total.values())
        return sum(self.fired.values()) / total if total else None


@torch.inference_mode()
def firing_rates(model: nn.Module, images: torch.Tensor) -> Dict[str, float]:
    """Firing rate per site of an SFormer on normalised images (B, C, H, W), in [0, 1]."""
    rates = FiringRates()
    with rates.observe(model):
        model(images)
    return rates.per_site()


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        dataset: str,
        split: Optional[str] = None,
        *,
        source: Union[bool, nn.Module] = True,
        num_images: Optional[int] = None,
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
        firing_images: int = 512,
        image_column: Optional[str] = None,
        label_column: Optional[str] = None,
) -> Dict[str, Any]:
    """Evaluate a classifier on a labelled dataset, an SFormer side by side with its source.

    Args:
        model: SFormer or any timm classifier.
        dataset: `digits`, a folder of parquet files, an image folder or a Hugging Face dataset id.
        split: Split of the dataset.
        source: Source network to compare with; True takes the weights of the SFormer with its neurons bypassed,
            False compares with nothing.
        num_images: Size of a random subset; all images if None.
        batch_size: Images per batch.
        workers: Processes that decode images.
        seed: Seed of the subset.
        firing_images: Firing rates are counted on the first this many images.
        image_column: Name of the image column, if it can't be detected.
        label_column: Name of the label column, if it can't be detected.

    Returns:
        Percentages `top1`, `top5`; for the source `source_top1`, `source_top5`, `agreement` (equal predictions, in
        percent), `relative_logit_error` (norm of the difference over norm of the source's logits); `firing_rate` in
        [0, 1] and `firing_rates` per site; `seconds` and `images_per_second` of the model alone; what was measured.

    Raises:
        UncalibratedError: If an SFormer has default thresholds.
        SFormerError: If the dataset can't be used, its labels do not fit the model, or logits are NaN.
    """
    from .data import open_images
    spiking = any(True for _ in named_neurons(model))
    if spiking and not is_calibrated(model):
        raise UncalibratedError(f'{uncalibrated(model)}; its accuracy would mean nothing. Use sformer.convert().')
    if not getattr(model, 'num_classes', 1):
        raise SFormerError('the model has no classes to predict (num_classes=0).')
    images = open_images(
        dataset, split, data_config=resolve_input_data_config(model), num_images=num_images, seed=seed,
        image_column=image_column, label_column=label_column, needs_labels=True)
    parameter = next(model.parameters())
    reference = source if isinstance(source, nn.Module) else model if source and spiking else None

    training = model.training
    model.eval()
    rates = FiringRates()
    count = top1 = top5 = source_top1 = source_top5 = agree = 0
    seconds = difference = norm = 0.
    try:
        for x, y in progress(images.batches(batch_size, workers), 'Evaluating', images.num_images):
            x, y = x.to(parameter.device, parameter.dtype), y.to(parameter.device)
            counting = spiking and count < firing_images
            with rates.observe(model) if counting else contextlib.nullcontext():
                start = time.perf_counter()
                logits = model(x).float()
                seconds += time.perf_counter() - start
            if not torch.isfinite(logits).all():
                raise SFormerError(f'NaN or infinite logits on images {count} to {count + len(x) - 1} of {dataset}.')
            if y.min() < 0 or y.max() >= logits.shape[1]:
                raise SFormerError(
                    f'{dataset} has label {int(y.max())}, the model has {logits.shape[1]} classes: '
                    f'this is not the dataset that it was trained for.')
            count += len(x)
            hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            if reference is not None:
                with bypass_neurons(model) if reference is model else contextlib.nullcontext():
                    expected = reference(x).float()
                hits = expected.topk(min(5, expected.shape[1])).indices == y[:, None]
                source_top1 += int(hits[:, 0].sum())
                source_top5 += int(hits.sum())
                agree += int((logits.argmax(1) == expected.argmax(1)).sum())
                difference += float((logits - expected).double().square().sum())
                norm += float(expected.double().square().sum())
    finally:
        model.train(training)
    if count != images.num_images:
        raise SFormerError(f'{dataset}: counted {count} images, expected {images.num_images}.')

    def percent(n):
        return round(100 * n / count, 4)

    result = dict(
        model=(getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        dataset=images.name, split=images.split, dataset_fingerprint=images.fingerprint, num_images=count,
        top1=percent(top1), top1_err=round(100 - percent(top1), 4),
        top5=percent(top5), top5_err=round(100 - percent(top5), 4),
    )
    if reference is not None:
        result.update(
            source_top1=percent(source_top1), source_top5=percent(source_top5), agreement=percent(agree),
            relative_logit_error=round((difference / norm) ** 0.5, 6) if norm else None)
    if spiking:
        result.update(firing_rate=rates.mean(), firing_rates=rates.per_site(),
                      firing_images=min(count, -(-firing_images // batch_size) * batch_size))
    return dict(
        result,
        param_count=round(sum(p.numel() for p in model.parameters()) / 1e6, 4),
        seconds=round(seconds, 3), images_per_second=round(count / seconds, 2),
        batch_size=batch_size, seed=seed, weights_sha256=state_hash(model.state_dict()), versions=library_versions(),
    )
