"""Networks to convert: what is refused, by name."""
import copy
import os
import pickle

import pytest
import timm
import torch
from conftest import NANO
from safetensors.torch import save_file

from sformer import SFormerError, UnsupportedLayerError, convert
from sformer.conversion.sources import load_source_weights_
from sformer.files import state_hash

NAME = 'vit_tiny_patch16_224'
LFS_POINTER = f'version https://git-lfs.github.com/spec/v1\noid sha256:{"0" * 64}\nsize 21598816\n'


def save_changed(path, source, **changes):
    """Save the state dict of a source with some tensors replaced (None: left out)."""
    state = {**source.state_dict(), **changes}
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, path)
    return path


def test_unknown_model_comes_with_a_suggestion():
    with pytest.raises(SFormerError, match=r"no model 'vit_tiny_patch16_22'\..*vit_tiny_patch16_224"):
        convert('vit_tiny_patch16_22')
    with pytest.raises(SFormerError, match='list_models'):
        convert('xyzzyxyzzy')


def test_wrong_arguments_of_the_source(checkpoint, source):
    with pytest.raises(SFormerError, match='no_such_argument'):
        convert(NAME, checkpoint=checkpoint, no_such_argument=1)
    with pytest.raises(SFormerError, match='num_heads'):
        convert(NAME, checkpoint=checkpoint, **dict(NANO, num_heads=7))
    with pytest.raises(TypeError, match='img_size'):
        convert(source, img_size=8)


def test_model_without_spiking_counterpart(images):
    with pytest.raises(UnsupportedLayerError, match='ResNet'):
        convert(timm.create_model('test_resnet', in_chans=1), [images])


def test_checkpoint_of_another_architecture(source, checkpoint, tmp_path):
    model = timm.create_model(NAME, **dict(NANO, depth=4))
    with pytest.raises(SFormerError, match=r'blocks\.2\.norm1\.weight is missing.*; and 21 more'):
        load_source_weights_(model, checkpoint)
    model = timm.create_model(NAME, **dict(NANO, depth=1))
    with pytest.raises(SFormerError, match=r'blocks\.1\.\S+ is not part of the model'):
        load_source_weights_(model, checkpoint)
    model = timm.create_model(NAME, **dict(NANO, num_classes=5))
    with pytest.raises(SFormerError, match=r'head\.weight is \(10, 64\) instead of \(5, 64\)'):
        load_source_weights_(model, checkpoint)
    one = save_changed(tmp_path / 'one.safetensors', source, **{'norm.bias': None})
    with pytest.raises(SFormerError, match=r'one\.safetensors .*: norm\.bias is missing\.$'):
        load_source_weights_(timm.create_model(NAME, **NANO), one)


def test_refused_checkpoint_leaves_the_model_alone(source, tmp_path):
    model = timm.create_model(NAME, **NANO)
    before = state_hash(model.state_dict())
    bad = save_changed(tmp_path / 'bad.safetensors', source, **{'norm.bias': None})
    with pytest.raises(SFormerError):
        load_source_weights_(model, bad)
    assert state_hash(model.state_dict()) == before


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.bin', '.ckpt', ''])
def test_pickle_is_refused(source, tmp_path, suffix):
    path = tmp_path / f'digits{suffix}'
    torch.save(source.state_dict(), path)
    with pytest.raises(SFormerError, match='not a safetensors file.*allow-pickle'):
        convert(NAME, checkpoint=path, **NANO)


def test_pickle_of_tensors_is_accepted_when_allowed(source, images, tmp_path):
    for name, content in (('plain.pth', source.state_dict()), ('wrapped.pth', {'state_dict': source.state_dict()})):
        torch.save(content, tmp_path / name)
        model = convert(NAME, [images], checkpoint=tmp_path / name, allow_pickle=True, **NANO)
        assert model.conversion.source_sha256 == state_hash(source.state_dict())


@pytest.mark.parametrize('name', ['parallel.safetensors', 'parallel.pth'])
def test_checkpoint_of_a_parallel_model(source, images, tmp_path, name):
    """What DataParallel and torch.compile put before the names is no part of them."""
    state = torch.nn.DataParallel(source).state_dict()
    assert all(k.startswith('module.') for k in state)
    (save_file if name.endswith('safetensors') else torch.save)(state, tmp_path / name)
    model = convert(NAME, [images], checkpoint=tmp_path / name, allow_pickle=True, **NANO)
    assert model.conversion.source_sha256 == state_hash(source.state_dict())


@pytest.mark.parametrize('name', ['pointer.safetensors', 'pointer.pth'])
def test_checkpoint_that_is_a_git_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(SFormerError, match=rf'{name} is a Git-LFS pointer, not the file itself: git lfs pull'):
        convert(NAME, checkpoint=tmp_path / name, allow_pickle=True, **NANO)


class Payload:
    """What a malicious checkpoint holds: unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    'save', [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o, protocol=2))], ids=['torch', 'raw'])
@pytest.mark.parametrize('name', ['evil.pth', 'evil.safetensors'])
def test_code_in_a_pickle_never_runs(tmp_path, save, name):
    owned = tmp_path / 'owned'
    save({'head.weight': Payload(owned)}, tmp_path / name)
    with pytest.raises(SFormerError, match=f'{name} (cannot be unpickled safely|is truncated or corrupted)'):
        convert(NAME, checkpoint=tmp_path / name, allow_pickle=True, **NANO)
    assert not owned.exists()


def test_damaged_safetensors(checkpoint):
    whole = checkpoint.read_bytes()
    damaged = dict(
        truncated=whole[:-1000], beheaded=whole[:100], empty=b'', longer=whole + b'x' * 1000,
        header=whole[:8] + whole[8:].replace(b'"F32"', b'"F3?"', 1),
        length=b'\xff' * 8 + whole[8:], text=b'<html>404 Not Found</html>')
    for name, content in damaged.items():
        checkpoint.write_bytes(content)
        with pytest.raises(SFormerError, match='digits.safetensors is truncated or corrupted'):
            convert(NAME, checkpoint=checkpoint, **NANO)
            pytest.fail(f'{name} was accepted')


def test_missing_checkpoint(tmp_path):
    for path in (tmp_path / 'no.safetensors', tmp_path):
        with pytest.raises(SFormerError, match='no checkpoint at'):
            convert(NAME, checkpoint=path, **NANO)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_broken_weights_are_named(source, images, tmp_path, value):
    weight = source.blocks[1].mlp.fc1.weight.detach().clone()
    weight[3, 5] = value
    path = save_changed(tmp_path / 'broken.safetensors', source, **{'blocks.1.mlp.fc1.weight': weight})
    with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1\.weight of .*broken\.safetensors'):
        convert(NAME, checkpoint=path, **NANO)
    broken = copy.deepcopy(source)
    broken.blocks[1].mlp.fc1.weight.data.copy_(weight)
    with pytest.raises(SFormerError, match=r'blocks\.1\.mlp\.fc1\.weight of the source'):
        convert(broken, [images])


def test_overflow_inside_the_source_is_located(own_source, images):
    own_source.blocks[0].mlp.fc1.weight.data *= 1e30
    with pytest.raises(SFormerError, match=r'infinite currents at blocks\.\d\.\S+neuron'):
        convert(own_source, [images])
