"""Which columns of a table hold the images, their labels and their names."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import SFormerError

__all__ = ['Columns', 'find_columns']

_IMAGE_COLUMNS = ('image', 'img', 'pixel_values', 'jpg', 'jpeg', 'png', 'webp', 'picture', 'photo')
_KEY_COLUMNS = ('__key__', 'file_name', 'filename', 'image_id')
_LABEL_COLUMNS = ('label', 'labels', 'fine_label', 'coarse_label', 'cls', 'class', 'target')


@dataclass(frozen=True)
class Columns:
    """Names of the columns in use.

    Args:
        image: Of the images.
        label: Of the labels, None where there are none.
        key: Of the file names, or what stands for them; None where there are none.
        class_names: Class names by label, None where unknown.
    """
    image: str
    label: str | None = None
    key: str | None = None
    class_names: list[str] | None = None

    @property
    def names(self) -> list[str]:
        return [c for c in (self.image, self.label, self.key) if c]


def find_columns(
        title: str,
        features: Mapping[str, object],
        image_column: str | None = None,
        label_column: str | None = None,
        needs_labels: bool = False,
) -> Columns:
    """Find the columns of a table.

    Usual names come first, in their order, among the columns that can hold what is looked for: `label` is preferred to
    another column of class labels. Without a usual name, the only column of the type is taken.

    Args:
        title: What the table is called in errors.
        features: Types of the columns (`datasets.Features`).
        image_column: Column of the images; None to find it.
        label_column: Column of the labels; None to find it.
        needs_labels: Insist on labels.

    Raises:
        SFormerError: There is no such column, none fits, several fit equally, or the labels are no class indices.
    """
    import datasets
    for column in (image_column, label_column):
        if column is not None and column not in features:
            raise SFormerError(f'{title} has no column {column!r}, but: {", ".join(features)}')
    if image_column is None:
        found = _candidates(features, _IMAGE_COLUMNS, datasets.Image, _may_be_image)
        if not found:
            raise SFormerError(f'no image column found in {title}: name one of {", ".join(features)}')
        image_column = _only(found, f'several columns of {title} may hold the images')
    if label_column is None:
        others = {column: feature for column, feature in features.items() if column != image_column}
        found = _candidates(others, _LABEL_COLUMNS, datasets.ClassLabel, _is_class_index)
        if needs_labels and not found:
            raise SFormerError(f'no label column found in {title}: ' + (
                f'name one of {", ".join(others)}' if others else f'its only column is {image_column}'))
        if needs_labels:
            label_column = _only(found, f'several columns of {title} may hold the labels')
        elif len(found) == 1 and _is_class_index(features[found[0]]):  # else nobody asked for it
            label_column = found[0]
    if label_column is not None and not _is_class_index(features[label_column]):
        raise SFormerError(f'column {label_column!r} of {title} holds no class indices: {features[label_column]}')
    label = features[label_column] if label_column else None
    return Columns(
        image=image_column,
        label=label_column,
        key=next((c for c in _KEY_COLUMNS if c in features), None),
        class_names=list(label.names) if isinstance(label, datasets.ClassLabel) else None,
    )


def _candidates(
        features: Mapping[str, object],
        names: Sequence[str],
        kind: type,
        fits: Callable[[object], bool],
) -> list[str]:
    """The columns to choose from: by a usual name if it fits, else of a type, else by a usual name, whatever it holds.
    """
    def named(columns: Sequence[str]) -> list[str]:
        found = ([c for c in columns if c.lower() == name] for name in names)
        return next(filter(None, found), [])

    typed = [c for c, feature in features.items() if isinstance(feature, kind)]
    return named([c for c, feature in features.items() if fits(feature)]) or typed or named(list(features))


def _only(candidates: list[str], problem: str) -> str:
    if len(candidates) > 1:
        raise SFormerError(f'{problem}: name one of {", ".join(candidates)}')
    return candidates[0]


def _may_be_image(feature: object) -> bool:
    """Whether a column can hold encoded images or pixels: no numbers, and no text, which seldom is the path of a file
    that is there."""
    import datasets
    if isinstance(feature, datasets.Value):
        return 'binary' in feature.dtype
    return not isinstance(feature, datasets.ClassLabel)


def _is_class_index(feature: object) -> bool:
    import datasets
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype.lstrip('u').startswith('int')
