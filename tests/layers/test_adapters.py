"""peft's adapters on spiking layers: they read spikes, so merging them into the weights changes nothing."""
import copy
import io

import pytest
import torch
from layer_tools import build, pixels, spiking

import sformer
from sformer import named_neurons, source_view

LINEAR = ['qkv', 'attn.proj', 'fc1', 'fc2']  # OFT of a convolution is not what it merges, spiking or not
EVERYWHERE = ['qkv', 'proj', 'fc1', 'fc2']  # `proj` is the patch embedding's, too


@pytest.fixture(scope='module')
def small():
    """In double precision, or rounding would push currents over the boundaries of levels. Not to be changed."""
    with torch.random.fork_rng([]):
        return spiking(build(), pixels()).double()


def adapted(model, config):
    from peft import get_peft_model  # takes seconds to load
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return get_peft_model(copy.deepcopy(model), config).eval()


def config(kind, targets, **kwargs):
    import peft
    return getattr(peft, f'{kind}Config')(target_modules=targets, **kwargs)


def lora(targets, **kwargs):
    return config('Lora', targets, init_lora_weights=False, **kwargs)  # so that they do something


@pytest.mark.parametrize('kind, targets, kwargs', [
    ('Lora', ['qkv'], dict(init_lora_weights=False)), ('Lora', EVERYWHERE, dict(init_lora_weights=False)),
    ('Lora', 'all-linear', dict(init_lora_weights=False)),
    ('Lora', EVERYWHERE, dict(init_lora_weights=False, use_dora=True)),
    ('LoKr', EVERYWHERE, dict(init_weights=False)),
    ('OFT', LINEAR, dict(init_weights=False, oft_block_size=4, use_cayley_neumann=False)),
    ('IA3', EVERYWHERE, dict(feedforward_modules=['fc2', 'proj'], init_ia3_weights=False))],
    ids=['qkv', 'everywhere', 'all linear', 'DoRA', 'LoKr', 'OFT', 'IA3'])
@pytest.mark.filterwarnings('ignore:Unmerge result can be inaccurate')
def test_merged_adapters_compute_the_same(kind, targets, kwargs, small):
    x, network = pixels(2, seed=5).double(), adapted(small, config(kind, targets, **kwargs))
    with torch.no_grad():
        out = network(x)
        assert (out - small(x)).norm() > 0.01 * out.norm()
        with network.disable_adapter():
            torch.testing.assert_close(network(x), small(x))
        network.merge_adapter()
        torch.testing.assert_close(network(x), out)
        network.unmerge_adapter()
        # peft divides by the factors of IA3 plus 1e-8 to take them out of weights again
        close = dict(rtol=1e-5, atol=1e-5) if kind == 'IA3' else {}
        with network.disable_adapter():
            torch.testing.assert_close(network(x), small(x), **close)
        merged = network.merge_and_unload()
        torch.testing.assert_close(merged(x), out, **close)
    assert [type(m) for m in merged.modules()] == [type(m) for m in small.modules()]


def test_merged_adapters_of_separate_projections_compute_the_same():
    with torch.random.fork_rng([]):
        source = spiking(build('eva02'), pixels()).double()
    network, x = adapted(source, lora(['q_proj', 'k_proj', 'v_proj', 'fc1_g', 'fc2'])), pixels(2, seed=5).double()
    with torch.no_grad():
        out = network(x)
        torch.testing.assert_close(network.merge_and_unload()(x), out)


def test_adapters_read_what_the_neuron_fires_and_it_fires_once(small):
    network, fired, read = adapted(small, lora(EVERYWHERE)), {}, {}
    for name, module in network.named_modules():
        if name.endswith('.base_layer'):
            outs = fired.setdefault(name.removesuffix('.base_layer'), [])
            module.neuron.register_forward_hook(lambda neuron, args, out, to=outs: to.append(out))
        if name.endswith('.lora_A.default'):
            inputs = read.setdefault(name.removesuffix('.lora_A.default'), [])
            module.register_forward_hook(lambda layer, args, out, to=inputs: to.append(args[0]))
    with torch.no_grad():
        network(pixels(2, seed=5).double())
    assert len(read) == 9 and fired.keys() == read.keys()
    assert all(torch.equal(x, spikes) for (spikes,), (x,) in zip(fired.values(), read.values(), strict=True))


def test_adapters_train(small):
    network = adapted(small, config('Lora', EVERYWHERE)).train()
    network(pixels(2, seed=5).double()).square().sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(trained) == 9 and all('lora_B' in name for name in trained)  # A learns as soon as B is not zero


def test_copies_of_an_adapted_model_compute_the_same(small):
    network, x = adapted(small, lora(EVERYWHERE)), pixels(2, seed=5).double()
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(network), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), network(x))


def test_source_of_an_adapted_model_has_its_adapters(small):
    network, x = adapted(small, lora(EVERYWHERE)), pixels(2, seed=5).double()
    view = source_view(network)
    assert not list(named_neurons(view))
    merged = source_view(adapted(small, lora(EVERYWHERE)).merge_and_unload())
    with torch.no_grad():
        torch.testing.assert_close(view(x), merged(x))


def test_fine_tuned_model_is_saved_merged(model, images, tmp_path):
    tuned = adapted(model, lora(['qkv', 'proj'])).merge_and_unload()
    loaded = sformer.load_model(sformer.save_model(tuned, tmp_path / 'tuned'))
    with torch.no_grad():
        assert torch.equal(loaded(images), tuned(images)) and not torch.equal(loaded(images), model(images))
    assert loaded.conversion.changed


def test_only_adapters_have_the_neuron_of_a_layer_fire(small):
    """Layers around a spiking one are left alone, however it is named."""
    model = spiking(build(), pixels())
    model.add_module('around', torch.nn.Sequential(model.blocks[0].mlp.fc1))
    assert not any(module._forward_pre_hooks for module in model.modules())
    hooked = [name for name, module in adapted(small, lora(['fc1'])).named_modules() if module._forward_pre_hooks]
    assert [name.rpartition('.')[2] for name in hooked] == ['fc1', 'fc1']
