"""Arguments as users type them: several values per option, `~`, key=value pairs."""
import ast
import json
import os
import re
import shlex
import sys
from pathlib import Path

from ..errors import SFormerError
from .failure import fail

__all__ = [
    'spread', 'expand_home', 'parse_kwargs', 'parse_names', 'parse_dataset_ids', 'command_line',
]


# options that take several values up to the next option, as in timm's own scripts
MULTI_VALUE = ('--model-kwargs', '--mean', '--std', '--label-names')
MULTI_VALUE_OF = {  # of one command only
    'benchmark': ('--execution', '--against', '--batch-size'), 'sweep': ('--levels',),
    'baselines': ('--levels', '--timesteps', '--only')}
AMP_NAMES = ('bfloat16', 'bf16', 'float16', 'fp16', 'half')


def spread(args: list[str]) -> list[str]:
    """`--std a b c` -> `--std a --std b --std c`; `--amp bf16` -> `--amp --amp-dtype bf16`."""
    out: list[str] = []
    option: str | None = None
    counts: dict[str, int] = {}
    multi_value = MULTI_VALUE + MULTI_VALUE_OF.get(args[0] if args else '', ())
    for arg in args:
        if arg in multi_value:
            option = arg
            counts.setdefault(arg, 0)
        elif arg in AMP_NAMES and out[-1:] == ['--amp']:
            out += ['--amp-dtype', arg]
        elif arg.startswith('-') and not _is_number(arg):
            option = None
            out.append(arg)
        elif option:
            if option == '--model-kwargs' and '=' not in arg:
                fail(f'--model-kwargs takes key=value pairs, got {arg!r}; the name of a model goes before this '
                     f'option.', 2)
            out += [option, arg]
            counts[option] += 1
        else:
            out.append(arg)
    for option, count in counts.items():
        if not count:
            fail(f'{option} has no values; is a variable of the shell unset?', 2)
    return out


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def expand_home(arg: str) -> str:
    """`~/x`, `--option=~/x` and `local-dir:~/x` with the home folder, where the shell left it to us."""
    start, path = re.fullmatch(r'((?:--[\w-]+=)?(?:local-dir:)?)(.*)', arg, re.DOTALL).groups()  # type: ignore[union-attr]
    return start + os.path.expanduser(path)


def parse_kwargs(pairs: list[str] | None) -> dict[str, object]:
    """`['img_size=32', 'global_pool=avg']` -> `{'img_size': 32, 'global_pool': 'avg'}`.

    timm's `ParseKwargs` reads values the same way, but takes none with another `=` in it, and any key.

    Raises:
        SFormerError: If a pair is none, or its key is not an argument of the network.
    """
    from ..saving.model_config import factory_arguments
    kwargs: dict[str, object] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition('=')
        if not equals or not key.isidentifier():
            raise SFormerError(f'--model-kwargs takes key=value pairs, got {pair!r}.')
        if key in factory_arguments() | {'name', 'checkpoint', 'preprocessing', 'device', 'dtype'}:
            raise SFormerError(f'--model-kwargs is for arguments of the network, which {key} is not.')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs


def parse_names(values: list[str] | None) -> list[str] | None:
    """Names as they are typed or, if the only one is that of a file, its lines, without blanks around them; of a JSON
    file a list, names by number or numbers by name.

    Raises:
        SFormerError: If the file is no text, or JSON of something else.
    """
    if not values or len(values) > 1 or not Path(values[0]).is_file():
        return values
    file = Path(values[0])
    try:
        text = file.read_text(encoding='utf-8-sig').strip()
    except (OSError, UnicodeDecodeError) as e:
        raise SFormerError(f'{file} is no text file of names, one per line: {e}.') from e
    if file.suffix.lower() == '.json':
        return _names_of_json(file, text)
    return [line.strip() for line in text.splitlines()]


def _names_of_json(file: Path, text: str) -> list[str]:
    from ..conversion.checkpoints import names_in_order
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise SFormerError(f'{file} cannot be read as JSON: {e}.') from e
    names = names_in_order(found) if isinstance(found, (list, dict)) else None
    if not names:
        raise SFormerError(f'{file} holds no names of classes: a list, names by their numbers, or numbers by name.')
    return names


def parse_dataset_ids(pairs: list[str] | None) -> dict[str, str]:
    """`['data/cifar10=uoft-cs/cifar10']` -> `{'data/cifar10': 'uoft-cs/cifar10'}`."""
    ids = dict(pair.rpartition('=')[::2] for pair in pairs or [])
    if not all(ids) or not all(ids.values()):
        raise SFormerError(f'--dataset-id takes NAME=org/dataset, got {", ".join(map(repr, pairs or []))}.')
    return ids


def command_line() -> str:
    """This command, as a record of it."""
    return shlex.join(['sformer', *sys.argv[1:]])
