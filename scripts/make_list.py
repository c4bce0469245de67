"""Write sformer/cli/models.json: what `sformer list` prints without loading torch.

    python scripts/make_list.py

Networks are built on the meta device, which takes no memory.
"""
import json

from sformer.cli.list_models import KNOWN
from sformer.files import write_aside
from sformer.saving.entrypoints import entries
from sformer.tasks import tasks


def main() -> None:
    others = [dict(heading=task.heading, names=task.names()) for task in tasks() if task.names()]
    known = dict(models=list(entries()), others=others)
    lists = [f'"{key}": [\n' + ',\n'.join(map(json.dumps, values)) + '\n]' for key, values in known.items()]
    with write_aside(KNOWN.parent) as aside:
        (aside / KNOWN.name).write_text('{\n' + ',\n'.join(lists) + '\n}\n', encoding='utf-8')
    print(', '.join(f'{len(values)} {key}' for key, values in known.items()))


if __name__ == '__main__':
    main()
