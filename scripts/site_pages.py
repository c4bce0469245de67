"""Hook of mkdocs.yml: pages lie in the site where they lie in the repository, so that links are the same in both."""
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff', 'docs/**/*', 'model_cards/*', 'scripts/*.*',
         'sformer/evaluation/figures.py')


def shown(root: Path) -> Iterator[Path]:
    """Files of the repository that the site has."""
    for pattern in PAGES:
        yield from sorted(path for path in root.glob(pattern) if path.is_file())


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    themes = [file for file in files if not Path(file.abs_src_path or '').is_relative_to(config.docs_dir)]
    pages = [File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in shown(root)]
    return Files([*themes, *pages])
