"""Where weights lie with what is said of them: a folder, or a repository on the Hub."""
import dataclasses
import json
from pathlib import Path

from ..errors import SFormerError, first_line
from ..files import Json
from .repositories import download, split_revision

__all__ = ['CONFIG', 'OPEN_CLIP_CONFIG', 'Place', 'named_place', 'place_of']

CONFIG = 'config.json'
OPEN_CLIP_CONFIG = 'open_clip_config.json'


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder, or a commit of a repository on the Hub, of which only the files that are asked for are fetched."""
    name: str
    folder: Path | None = None
    repo_id: str = ''
    revision: str | None = None
    cache_dir: str | Path | None = None

    def find(self, name: str, optional: bool = True) -> Path | None:
        """A file by its name; None if there is none.

        Raises:
            SFormerError: If the repository cannot be read.
        """
        if self.folder is None:
            return download(self.repo_id, name, self.revision, self.cache_dir, optional)
        path = self.folder / name
        return path if path.is_file() else None

    def read(self, name: str, optional: bool = True) -> Json | None:
        """An object of JSON in a file; None if there is no such file.

        Raises:
            SFormerError: If it is something else.
        """
        path = self.find(name, optional)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            if not isinstance(content, dict):
                raise ValueError(f'it is a {type(content).__name__}')
        except (OSError, ValueError, RecursionError) as e:
            raise SFormerError(f'{path} is no object of JSON: {first_line(e)}.') from e
        return content


def named_place(name: str, cache_dir: str | Path | None = None) -> Place | None:
    """The folder or repository of `hf-hub:org/name[@revision]`, `local-dir:FOLDER` or `FOLDER`; None of other names."""
    if name.startswith('hf-hub:'):
        repo_id, revision = split_revision(name.removeprefix('hf-hub:'))
        return Place(name, repo_id=repo_id, revision=revision, cache_dir=cache_dir)
    path = Path(name.removeprefix('local-dir:'))
    return Place(str(path), path) if name.startswith('local-dir:') or path.is_dir() else None


def place_of(place: Place) -> tuple[Place, Json]:
    """A place whose repository is pinned to a commit, and its config; that of open_clip if it has no other.

    Raises:
        SFormerError: If it has none.
    """
    if place.folder is not None and not place.folder.is_dir():
        raise SFormerError(f'{place.folder} is no folder.')
    for name in (CONFIG, OPEN_CLIP_CONFIG):
        config = place.read(name, optional=name != CONFIG)
        if config is not None:
            if place.folder is None:
                path = place.find(name)
                assert path is not None
                place = dataclasses.replace(place, revision=path.parent.name)
            return place, config
    raise SFormerError(f'{place.name} has no {CONFIG}, so nothing says what its weights are of. A file of weights is '
                       f'converted with the name of its timm model: sformer convert NAME --checkpoint FILE.')
