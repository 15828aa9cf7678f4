# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the files of an adapter are called and say, for scripts that do without PEFT."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class AdapterError(ValueError):
    """An adapter that cannot be read or does not fit the model; the message says what and why."""


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Metadata and shapes of a safetensors file, without its weights."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, shapes
    except SafetensorError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
