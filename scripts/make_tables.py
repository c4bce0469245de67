"""Write the tables of the documents that say which figures a result has, from the schema of results.

    python scripts/make_tables.py
"""
import re
from pathlib import Path

from sformer.evaluation.figures import CLASSIFICATION, DETECTION
from sformer.evaluation.schema import Schema
from sformer.files import write_aside

DOCS = Path(__file__).parents[1] / 'docs'
TABLES = {'evaluate.md': CLASSIFICATION, 'detection.md': DETECTION}
TABLE = re.compile(r'(?<=<!-- written by scripts/make_tables.py -->\n).*?(?=\n\n)', re.S)


def with_table(page: str, schema: Schema) -> str:
    """A page with the table of a schema in the place of the one that it has."""
    return TABLE.sub(lambda found: schema.documented(), page, count=1)


def main() -> None:
    for name, schema in TABLES.items():
        text = with_table((DOCS / name).read_text(encoding='utf-8'), schema)
        with write_aside(DOCS) as aside:
            (aside / name).write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
