"""Files that are written aside, and what is left of those that were not finished."""
import copy
import errno
import json
import multiprocessing
import os

import pytest
import torch

from sformer import UnsupportedLayerError, convert, evaluate
from sformer.files import file_hash, restore, state_hash, write_aside, write_json


def test_json_is_written_aside(tmp_path, monkeypatch):
    path = tmp_path / 'results.json'
    write_json(path, dict(a=1))
    with pytest.raises(TypeError):
        write_json(path, dict(a=object()))
    assert json.loads(path.read_text()) == dict(a=1)
    assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_writers_of_one_folder_take_turns(tmp_path):
    """What lies in the folder while one writes is never that of another one at work."""
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=write_pair, args=(tmp_path, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {p.name for p in tmp_path.iterdir()} == {'a', 'b'}
    assert (tmp_path / 'a').read_text() == (tmp_path / 'b').read_text()


def write_pair(folder, i):
    for _ in range(20):
        with write_aside(folder) as aside:
            assert len([p for p in folder.iterdir() if p.name.startswith('.writing-')]) == 1
            for name in 'ab':
                (aside / name).write_text(str(i))


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    for name in ('.writing-dead', '.writing-empty', 'mine'):
        (tmp_path / name / 'new').mkdir(parents=True)
    (tmp_path / '.writing-dead' / 'new' / 'model.safetensors').write_text('x')
    write_json(tmp_path / 'results.json', dict(a=1))
    assert {p.name for p in tmp_path.iterdir()} == {'results.json', 'mine'}


def test_leftovers_where_nothing_can_be_locked(tmp_path, monkeypatch):
    """Without locks only age tells that nobody is at work there."""
    def flock(*args):
        raise OSError(37, 'No locks available')
    monkeypatch.setattr('fcntl.flock', flock)
    for name, age in (('.writing-old', 7200), ('.writing-new', 0)):
        (tmp_path / name).mkdir()
        time = os.stat(tmp_path).st_mtime - age
        os.utime(tmp_path / name, (time, time))
    write_json(tmp_path / 'results.json', dict(a=1))
    assert {p.name for p in tmp_path.iterdir()} == {'results.json', '.writing-new'}


def test_restore(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    digest = file_hash(path)
    assert restore(path, digest) and not restore(path, '0' * 64)
    for part in ('new', 'old'):
        leftover = tmp_path / '.writing-x' / part / 'file'
        leftover.parent.mkdir(parents=True)
        leftover.write_text(part)
    path.unlink()
    assert restore(path, digest) and path.read_text() == 'old'
    assert not restore(tmp_path / 'other', digest)


def test_state_hash():
    state = dict(a=torch.arange(6.).view(2, 3), b=torch.tensor(True))
    assert state_hash(state) == state_hash(dict(reversed(state.items())))
    assert state_hash(state) == state_hash(dict(state, a=state['a'].t().contiguous().t()))
    for other in (dict(state, a=state['a'] + 1e-6), dict(state, a=state['a'].view(3, 2)), dict(a=state['a']),
                  dict(state, a=state['a'].double()), dict(c=state['a'], b=state['b'])):
        assert state_hash(other) != state_hash(state)


@pytest.mark.filterwarnings('ignore')
def test_weights_that_are_packed_have_a_hash(own_source):
    """Those of dynamically quantised networks, which can be evaluated, and are refused by name as sources."""
    packed = torch.ao.quantization.quantize_dynamic(own_source, {torch.nn.Linear})
    hashed = state_hash(packed.state_dict())
    assert hashed == state_hash(copy.deepcopy(packed).state_dict())
    with torch.no_grad():
        own_source.head.weight.mul_(2)
    assert hashed != state_hash(torch.ao.quantization.quantize_dynamic(own_source, {torch.nn.Linear}).state_dict())
    assert evaluate(packed, 'digits', num_images=64)['top1'] > 80
    with pytest.raises(UnsupportedLayerError, match='LinearPackedParams'):
        convert(packed, 'digits', split='train', num_images=16)


def test_full_disk_is_named(tmp_path):
    with pytest.raises(OSError) as caught, write_aside(tmp_path / 'cards'):
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert caught.value.filename == str(tmp_path / 'cards') and not list(tmp_path.iterdir())
