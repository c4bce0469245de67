"""Where options stand in the help of a command: first, without a panel of their own, what everybody needs."""
import inspect

import typer

__all__ = ['PANELS', 'fill_panels']

# panel -> options; an option is in the same panel in every command
PANELS: dict[str, tuple[str, ...]] = {
    'Neurons': ('fire', 'attention_fire', 'activation_fire', 'initial_potential', 'dead_zone', 'scale', 'token_scale',
                'silence', 'keys_rest', 'lateral', 'lateral_zone', 'lateral_cost'),
    'Thresholds': ('estimator', 'quantile', 'floor', 'margin', 'unbiased', 'compensate', 'balance', 'concentrate',
                   'effort'),
    'Source': ('model_kwargs', 'label_names', 'source', 'source_model'),
    'Images': ('seed', 'batch_size', 'workers', 'image_column', 'label_column', 'streaming', 'benchmark',
               'by_position', 'max_bad', 'skip_bad'),
    'Preprocessing': ('mean', 'std', 'img_size', 'crop_pct', 'interpolation'),
    'Detector': ('finest_stride', 'channels', 'window_size', 'max_detections'),
    'Training': ('lr', 'learning_rate', 'trained_blocks', 'price'),
    'Execution': ('device', 'engine', 'amp', 'amp_dtype', 'channels_last', 'torchcompile', 'retry'),
    'Processes': ('num_processes', 'timeout', 'resume'),
    'Record': ('license', 'base_model', 'dataset_id'),
}
PANEL_OF = {option: panel for panel, options in PANELS.items() for option in options}


def fill_panels(app: typer.Typer) -> None:
    """Put the options of all commands into their panels."""
    for group in app.registered_groups:
        if group.typer_instance:
            fill_panels(group.typer_instance)
    for command in app.registered_commands:
        assert command.callback is not None
        for parameter in inspect.signature(command.callback).parameters.values():
            for option in getattr(parameter.annotation, '__metadata__', ()):
                if isinstance(option, typer.models.OptionInfo):
                    option.rich_help_panel = PANEL_OF.get(parameter.name)
