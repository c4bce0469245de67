"""What is in the zoo: every registered entry with its source, size, licence and measured results."""
import json
from pathlib import Path
from typing import Any, Dict, Iterator

import timm
import torch

from .models import SOURCES, ZOO
from .utils import progress

__all__ = ['entries', 'source_name']


def source_name(name: str) -> str:
    """timm name, with tag, of the network that an entry of the zoo is converted from.

    Args:
        name: `sformer_*` name with or without tag.

    Raises:
        KeyError: If there is no such entry.
    """
    architecture, _, tag = name.partition('.')
    if architecture in ZOO:
        source, tags = ZOO[architecture]
        return f'{source}.{tag or tags.split()[0]}'
    return SOURCES[architecture]


def entries() -> Iterator[Dict[str, Any]]:
    """Every registered entry: name, source, param_count (millions), input_size, num_classes, license, weights, results.
    """
    params: Dict[str, float] = {}
    names = [name for name in timm.list_models('sformer*', include_tags=True) if name.split('.')[0] in SOURCES]
    for name in progress(names, 'Counting parameters', len(names)):
        architecture = name.split('.')[0]
        cfg = timm.get_pretrained_cfg(name)
        if architecture not in params:
            with torch.device('meta'):
                model = timm.create_model(architecture)
            params[architecture] = sum(p.numel() for p in model.parameters()) / 1e6
        weights = 'in the package' if cfg.file else 'converted on first use' if cfg.hf_hub_id else 'none, for tests'
        yield dict(
            name=name, source=source_name(name), param_count=params[architecture], input_size=cfg.input_size,
            num_classes=cfg.num_classes, license=cfg.license or '', weights=weights, results=_measured(cfg.file))


def _measured(weights: Any) -> str:
    """Recorded result of an entry whose weights are in the package: N, SFormer and source."""
    record = Path(weights).with_suffix('.json') if weights else None
    if record is None or not record.is_file():
        return ''
    data = json.loads(record.read_text(encoding='utf-8'))
    result = data.get('evaluation')
    if not result:
        return ''
    return f'{result["top1"]:.2f} (source {result["source_top1"]:.2f}), N = {data["conversion"]["recipe"]["levels"]}'
