"""What a processor says of itself, and what is said of it."""
import pytest
import torch

from sformer.execution import processor as module
from sformer.execution.processor import instruction_set, int8_verdict, processor, slowdown

CPU = 'processor\t: {}\nmodel name\t: A Chip {}\nflags\t\t: fpu avx2 {} avx512f\nbugs\t\t:\n\n'


def says(monkeypatch, tmp_path, text):
    """Have the system say so; nothing if None."""
    if text is not None:
        (tmp_path / 'cpuinfo').write_text(text)
    monkeypatch.setattr(module, 'Path', lambda name: tmp_path / 'cpuinfo')


def test_names(monkeypatch, tmp_path):
    says(monkeypatch, tmp_path, CPU.format(0, 'X', 'avx512_vnni') + CPU.format(1, 'X', 'avx512_vnni'))
    for limit in module.LIMITS:
        monkeypatch.delenv(limit, raising=False)
    assert processor() == 'A Chip X' and instruction_set() == 'avx512_vnni avx512f avx2'
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'AVX2')
    assert instruction_set() == 'avx512_vnni avx512f avx2; limited by ONEDNN_MAX_CPU_ISA=AVX2'
    monkeypatch.delenv('ONEDNN_MAX_CPU_ISA')
    says(monkeypatch, tmp_path, 'Features\t: fp asimd asimddp i8mm\n')  # as ARM says it, which names no model
    assert instruction_set() == 'asimddp i8mm' and processor()


def test_systems_that_say_nothing(monkeypatch, tmp_path):
    says(monkeypatch, tmp_path, None)
    monkeypatch.setattr(module.platform, 'machine', lambda: 'a machine')
    monkeypatch.setattr(module.platform, 'processor', lambda: '')
    assert processor() == 'a machine' and instruction_set().startswith('a machine')


@pytest.mark.parametrize('gain, words', [
    (0.8, 'gain nothing in time'), (1.1, 'gain little in time'), (1.2, ''), (3., '')])
def test_verdicts(monkeypatch, gain, words):
    monkeypatch.setattr(module, 'int8_gain', lambda engine: gain)
    verdict = int8_verdict('openvino')
    assert words in verdict and bool(verdict) == bool(words)
    assert not verdict or f'openvino multiplies int8 {gain:.2f} times as fast as float32' in verdict


def test_products_in_other_dtypes_are_timed(monkeypatch):
    """By the least time of some calls, after one that does not count."""
    dtypes = []

    def linear(rows, weight):
        assert rows.dtype == weight.dtype
        dtypes.append(rows.dtype)
    ticks = iter([0, 9, 9, 12, 12, 14, 14, 20, 20, 24, 24, 30] + [0, 5, 5, 6, 6, 10, 10, 20, 20, 30, 30, 40])
    monkeypatch.setattr(module.F, 'linear', linear)
    monkeypatch.setattr(module.time, 'perf_counter', lambda: next(ticks))
    slowdown.cache_clear()
    try:
        assert slowdown(torch.bfloat16) == 2 / 1
    finally:
        slowdown.cache_clear()
    assert dtypes == [torch.bfloat16] * 6 + [torch.float32] * 6
