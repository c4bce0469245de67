"""The loop: batches, precision, memory, workers, unreadable images."""
import copy
import io
import multiprocessing
import sys

import pytest
import timm
import torch
from conftest import NANO
from evaluation_tools import steady

from sformer import SFormerError, convert, evaluate
from sformer.layers import named_neurons


def greedy(model, limit, layer=''):
    """A network that has no memory for more than so many images in a layer."""
    def check(module, args):
        if len(args[0]) > limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: ...")
    model = copy.deepcopy(model)
    model.get_submodule(layer).register_forward_pre_hook(check)
    return model


def test_out_of_memory(source, capsys):
    expected = evaluate(source, 'digits', batch_size=64, num_images=100)
    with pytest.raises(SFormerError, match='out of memory with batches of 64: .* --retry'):
        evaluate(greedy(source, 20), 'digits', batch_size=64)
    result = evaluate(greedy(source, 20), 'digits', batch_size=64, num_images=100, retry=True)
    assert result['batch_size'] == 16 and 'batches of 16 from now on' in capsys.readouterr().err
    assert (result['num_images'], result['top1']) == (100, expected['top1'])
    with pytest.raises(SFormerError, match='even one image does not fit'):
        evaluate(greedy(source, 0), 'digits', batch_size=4, retry=True)


def test_spikes_of_what_did_not_fit_are_not_counted(model):
    expected = evaluate(model, 'digits', batch_size=64, num_images=100)
    result = evaluate(greedy(model, 20, 'norm'), 'digits', batch_size=64, num_images=100, retry=True)
    assert result['batch_size'] == 16
    assert result['activity_per_site'] == pytest.approx(expected['activity_per_site'], rel=1e-3)


def test_mixed_precision(model):
    half = evaluate(model, 'digits', num_images=64, amp='bfloat16', channels_last=True)
    assert half['amp'] == 'bfloat16' and half['top1'] > 90
    assert half['nll'] != evaluate(model, 'digits', num_images=64)['nll']
    assert not any(p.is_inference() for p in model.parameters()), 'the model can still be trained'
    assert model.patch_embed.proj.weight.is_contiguous(), 'the model itself is left alone'


def test_bfloat16(model, result):
    half = evaluate(copy.deepcopy(model).bfloat16(), 'digits')
    assert half['top1'] > 97 and half['agreement'] > 97


def test_labels_out_of_range(model):
    five = copy.deepcopy(model)
    five.reset_classifier(5)
    five.train()
    with pytest.raises(SFormerError, match=r'digits has label 9, the model has 5 classes'):
        evaluate(five, 'digits')
    assert five.training, 'an error leaves the model in eval mode'


def test_nan_logits_are_located(model):
    broken = copy.deepcopy(model)
    broken.head.bias.data[0] = float('nan')
    with pytest.raises(SFormerError, match=r'NaN or infinite logits on images 0 to 63 of digits'):
        evaluate(broken, 'digits')


def test_unreadable_images_are_counted_named_and_limited(model, digit_files):
    folder = digit_files(2, damaged=(3, 150))
    for streaming in (False, True):
        with pytest.raises(SFormerError, match='cannot read image 3 of '):
            evaluate(model, folder, streaming=streaming)
        with pytest.raises(SFormerError, match=r'cannot read image \d+ of .*--max-bad 1 is exceeded'):
            evaluate(model, folder, streaming=streaming, max_bad=1)
        result = evaluate(model, folder, streaming=streaming, max_bad=2)
        assert result['num_images'] == 198 and len(result['bad_images']) == 2
        assert all('not an image' in name for name in result['bad_images'])


@pytest.mark.parametrize('batch_size', [7, 540])
def test_batch_size_does_not_matter(coarse, result, batch_size):
    other = evaluate(coarse, 'digits', 'test', batch_size=batch_size, activity_images=540)
    for key in ('top1', 'top5', 'source_top1', 'agreement', 'dataset_fingerprint', 'weights_sha256'):
        assert other[key] == result[key], key
    assert other['relative_logit_error'] == pytest.approx(result['relative_logit_error'], rel=1e-3)
    assert other['activity'] == pytest.approx(result['activity'], rel=1e-3)


def test_workers(coarse, result):
    """As many processes as asked for read while the networks run."""
    for workers in (0, 2):
        model, seen = copy.deepcopy(coarse), []
        model.patch_embed.proj.neuron.register_forward_pre_hook(
            lambda neuron, args, seen=seen: seen.append(len(multiprocessing.active_children())))
        other = evaluate(model, 'digits', 'test', workers=workers, activity_images=540)
        assert (seen[0], other['workers']) == (workers, workers)
        assert steady(other, 'workers') == steady(result, 'workers')


@pytest.mark.parametrize('backend', ['eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled_networks(images, monkeypatch, backend):
    """The model and its source are compiled, and count what they count otherwise."""
    torch.manual_seed(0)
    network = convert(timm.create_model('vit_tiny_patch16_224', **dict(NANO, depth=1)), [images])
    compiled, compile = [], torch.compile

    def look(model):
        fast, calls = compile(model, backend=backend), []
        compiled.append((model, calls))
        return lambda x: calls.append(len(x)) or fast(x)
    monkeypatch.setattr(torch, 'compile', look)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = dict(num_images=96, batch_size=32, activity_images=32)
    result = evaluate(network, 'digits', torchcompile=True, **options)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] >= 2
    (model, of_model), (its_source, of_source) = compiled
    assert of_model == [32, 32], 'spikes are counted on the first batch, by hooks'
    assert of_source == [32, 32, 32] and not list(named_neurons(its_source))
    eager = evaluate(network, 'digits', **options)
    assert result['torchcompile'] and not eager['torchcompile'] and len(compiled) == 2
    assert result['activity'] == eager['activity']
    for key in ('nll', 'source_nll', 'relative_logit_error'):
        assert result[key] == pytest.approx(eager[key], rel=1e-2), key


def test_a_terminal_is_told_how_far_it_is(model, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '200')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    result = evaluate(model, 'digits', num_images=64, batch_size=32, source=False)
    last = [line for line in sys.stderr.getvalue().splitlines() if 'Evaluating' in line][-1]
    assert '64/64' in last and f'top-1 {result["top1"]:.2f} %' in last and 'images/s' in last


def test_networks_that_do_not_compile_are_one_line(model, monkeypatch):
    """As without a C++ compiler."""
    compile = torch.compile

    def broken(graph, inputs):
        raise RuntimeError('No working C++ compiler found\nand many lines')
    monkeypatch.setattr(torch, 'compile', lambda network: compile(network, backend=broken))
    torch._dynamo.reset()
    with pytest.raises(SFormerError, match='cannot be compiled .*No working C.. compiler found.*leave out --torchcomp'):
        evaluate(model, 'digits', torchcompile=True, num_images=32, activity_images=0)
