"""scripts/publish_zoo.py: the whole zoo, entry by entry."""
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from conftest import NANO
from hub_fixtures import FILES, assert_same, nothing_loads, timm_load
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import sformer
from sformer import SFNConfig, SFormerError, load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def zoo():
    spec = importlib.util.spec_from_file_location(
        'publish_zoo', ROOT / 'scripts' / 'publish_zoo.py')
    sys.modules['publish_zoo'] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_entry(zoo, source, tmp_path):
    save_file(source.state_dict(), tmp_path / 'digits.safetensors')
    return zoo.Entry(
        'sformer_nano.zoo', 'vit_tiny_patch16_224', SFNConfig(levels=8), calibration='digits', split='train',
        num_images=64, dataset='digits', checkpoint=tmp_path / 'digits.safetensors', model_kwargs=NANO,
        data_config=dict(mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation='bilinear'), license='apache-2.0')


def test_table_of_the_zoo(zoo):
    entries = zoo.zoo()
    assert len({e.name for e in entries}) == len(entries) >= 35
    for entry in entries:
        architecture, _, tag = entry.name.partition('.')
        source, tags = sformer.models.zoo.ZOO[architecture]
        assert entry.source == f'{source}.{tag}' and tag in tags.split()
        assert timm.get_pretrained_cfg(entry.source).num_classes > 0, 'nothing to evaluate'
    left_out = {name for name in timm.list_models('sformer*', pretrained=True)
                if not timm.get_pretrained_cfg(name).file} - {e.name for e in entries}
    assert all(timm.get_pretrained_cfg(name).num_classes == 0 for name in left_out)


def test_zoo_entry_by_entry(hub, zoo, tiny_entry, tmp_path, monkeypatch, images, capsys):
    """Interrupted at each step, it goes on with the next."""
    work, calls = tmp_path / 'zoo', []
    for module, name in ((sformer, 'convert'), (sformer, 'evaluate')):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    hub.fail('POST', '/commit/', 503, 'Service Unavailable', times=1)
    def run(entry=tiny_entry, curve=(4,)):
        return zoo.run([entry], 'my-org', work, curve=curve, num_images=50)

    failed = run()
    assert failed.keys() == {'sformer_nano.zoo'} and '503' in failed['sformer_nano.zoo']
    assert calls == ['convert', 'evaluate'] * 2
    nothing_loads()

    assert run() == {}
    assert calls == ['convert', 'evaluate'] * 2, 'it was done again'
    commits = len(hub.repos['my-org/sformer_nano.zoo'].commits)
    assert run() == {}
    assert len(hub.repos['my-org/sformer_nano.zoo'].commits) == commits == 2
    assert 'nothing has changed' in capsys.readouterr().out

    files = hub.files('my-org/sformer_nano.zoo')
    assert files.keys() == FILES | {'.gitattributes', 'plots/accuracy.png'}
    card = ModelCard(files['README.md'].decode())
    assert card.data.license == 'apache-2.0' and card.data.base_model is None
    assert '| 4 | ' in card.text and '| 8 | ' in card.text
    assert_same(timm_load('my-org/sformer_nano.zoo'), load_model(work / tiny_entry.name), images)

    (work / tiny_entry.name / 'eval.json').unlink()
    assert run(curve=()) == {}
    assert calls == ['convert', 'evaluate'] * 2 + ['evaluate'], 'only what was missing'
    assert run(replace(tiny_entry, config=SFNConfig(levels=16)), ()) == {}
    assert calls[5:] == ['convert', 'evaluate'], 'a row that was changed'


def test_zoo_goes_on_after_an_entry_that_fails(hub, zoo, tiny_entry, tmp_path, capsys):
    broken = replace(tiny_entry, name='sformer_nano.broken', checkpoint=tmp_path / 'nothing.safetensors')
    failed = zoo.run([broken, tiny_entry], 'my-org', tmp_path / 'zoo', num_images=50)
    assert failed.keys() == {'sformer_nano.broken'} and 'no checkpoint at' in capsys.readouterr().err
    assert set(hub.repos) == {'my-org/sformer_nano.zoo'}


def test_zoo_says_what_is_missing_before_any_work(hub, zoo, tiny_entry, tmp_path, monkeypatch):
    with pytest.raises(SFormerError, match='not a name that the Hub allows'):
        zoo.run([tiny_entry], 'my org', tmp_path / 'zoo')
    failed = zoo.run([replace(tiny_entry, dataset=None)], 'my-org', tmp_path / 'zoo')
    assert '--imagenet' in failed[tiny_entry.name]
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(SFormerError, match='needs an access token'):
        zoo.run([tiny_entry], 'my-org', tmp_path / 'zoo')
    assert not (tmp_path / 'zoo').exists()
    assert zoo.run([tiny_entry], 'my-org', tmp_path / 'zoo', dry_run=True, num_images=50) == {}
    assert hub.log == []


@pytest.mark.slow
def test_zoo_in_two_processes(hub, environment, source, tmp_path, images):
    """The main process converts and publishes, all evaluate."""
    save_file(source.state_dict(), tmp_path / 'digits.safetensors')
    (tmp_path / 'two.py').write_text(f'''
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / 'scripts')!r})
from publish_zoo import Entry, run
entry = Entry(
    'sformer_nano.zoo', 'vit_tiny_patch16_224', calibration='digits', split='train', num_images=64, dataset='digits',
    checkpoint=Path('digits.safetensors'), model_kwargs={NANO!r}, data_config=dict(mean=(.5,), std=(.5,), crop_pct=1.))
bad = Entry('sformer_nano.bad', 'vit_tiny_patch16_224', dataset='digits', checkpoint=Path('nothing.safetensors'))
assert set(run([bad, entry], 'my-org', Path('zoo'))) == {{'sformer_nano.bad'}}
''')
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '29631', 'two.py'],
        env=dict(environment, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'), cwd=tmp_path, capture_output=True,
        text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert hub.count('POST', '/commit/') == 1
    assert_same(timm_load('my-org/sformer_nano.zoo'), load_model(tmp_path / 'zoo' / 'sformer_nano.zoo'), images)
