"""A data module from the same YAML files that a training is started with."""

from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser

from datamodules.wider_face import WiderFaceDataModule
from retinaface.errors import InputError, find_input_error


def load_datamodule(config: Sequence[Path], root: Path | None = None) -> WiderFaceDataModule:
    """Makes the data module that the ``data`` sections of configuration files describe; other sections do not matter.

    Args:
        config: YAML files, such as ``configs/data/wider_face.yaml`` or the ``config.yaml`` of a run; as in a training,
            what a later one says replaces what an earlier one says.
        root: Data root to use instead of theirs.

    Returns:
        The data module, neither prepared nor set up.

    Raises:
        InputError: A file cannot be read or is no YAML, none has a ``data`` section, or an option is wrong.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(WiderFaceDataModule, "data", required=True)
    sections = [(str(file), section) for file in config if (section := _read_section(file))]
    if not sections:
        raise InputError(f"{', '.join(map(str, config))}: no data section; give a file such as configs/data/*.yaml")
    if root is not None:
        sections.append(("--root", {"init_args": {"root": str(root)}}))
    options = None
    for source, section in sections:
        try:
            options = parser.parse_object({"data": section}, namespace=options)
        except ArgumentError as error:
            raise InputError(f"{source}: {error}") from error
    try:
        datamodule = parser.instantiate(options).data
    except Exception as error:
        wrong_input = find_input_error(error)
        if wrong_input is None:
            raise
        raise InputError(f"data: {wrong_input}") from error
    assert isinstance(datamodule, WiderFaceDataModule)
    return datamodule


def _read_section(file: Path) -> object:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give a YAML file with a data section") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is no YAML; give a file such as configs/data/*.yaml") from error
    return content.get("data") if isinstance(content, dict) else None
