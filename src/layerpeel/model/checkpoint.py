"""Checks of a checkpoint's files, and its dtype, before its weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PretrainedConfig

from layerpeel.errors import InputError, reason_of
from layerpeel.model.checkpoint_keys import DEQUANTISE, QUANTISER_PARTS, quantised_with
from layerpeel.model.config_fields import text_config
from layerpeel.model.tensor_files import FLOATS

NARROW = ("F8_", "F6_", "F4")  # how the names of dtypes begin that only quantisers write; F64 is none of them
MOST_PER_BYTE = 8  # parameters in one byte of a checkpoint, at one bit each


def least_parameters(config: PretrainedConfig) -> int:
    """A lower bound of a model's parameters: its embeddings, and one square matrix for each layer."""
    text = text_config(config)
    sizes = [getattr(text, name, 0) for name in ("vocab_size", "hidden_size", "num_hidden_layers")]
    vocabulary, width, depth = (size if isinstance(size, int) else 0 for size in sizes)
    return width * (vocabulary + depth * width)


def check_weights(config: PretrainedConfig, path: str | Path) -> None:
    """Checks the headers of a folder's weight files, before memory is allocated for the weights.

    Raises:
        InputError: a file is damaged or missing, the index names a file outside the folder, weights are integers or
            floats of 8 bits though config.json does not say that they are quantised, or it describes a far larger model
            than the files hold.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    indexed = _indexed_files(folder)
    for name in sorted(indexed):
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(
                f"{folder}: the index of its weights names {name}, and there is no such file in the folder",
                hint="fetch a complete checkpoint",
            )
    size = 0
    for file in sorted(_read_files(folder, indexed)):
        try:
            with safe_open(file, framework="pt") as opened:
                dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        except Exception as error:
            raise InputError(
                f"{file}: no safetensors file, or not whole ({reason_of(error)})", hint="fetch it again"
            ) from None
        if not quantised_with(config):
            _check_floating(dtypes, folder)
        size += file.stat().st_size
    if size and least_parameters(config) > MOST_PER_BYTE * size:
        raise InputError(
            f"{folder / 'config.json'}: it describes a model of {least_parameters(config):,} parameters or more, and "
            f"the weights have {size:,} bytes",
            hint="take config.json and weights from the same checkpoint",
        )


def _check_floating(dtypes: Mapping[str, str], path: Path) -> None:
    """Refuses weights that are integers or narrow floats, which would be taken for the values themselves."""
    has_scales = any(QUANTISER_PARTS.search(name) for name in dtypes)  # which `check_keys` names
    for name, dtype in sorted(dtypes.items()):
        is_narrow = dtype.startswith(NARROW)
        if not has_scales if is_narrow else name.endswith(".weight") and dtype not in FLOATS:
            raise InputError(
                f"{path}: {name} is stored as {dtype}: it is quantised, and config.json does not say how",
                hint=DEQUANTISE,
            )


def _read_files(folder: Path, indexed: set[str]) -> list[Path]:
    """The weight files that are read: `model.safetensors`, or else those that the index names."""
    single = folder / "model.safetensors"
    return [single] if single.is_file() else [folder / name for name in indexed]


def _indexed_files(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{index}: no index of weights ({reason_of(error)})", hint="fetch a complete checkpoint"
        ) from None


def hint_for_weights(config: PretrainedConfig, path: str | Path) -> str:
    """What to do about weights that transformers cannot load."""
    folder = Path(path)
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if "generation_config.json" in names and not _is_generation_config(folder):
        return "transformers cannot read generation_config.json: mend it, or take it away (a default is used then)"
    if getattr(config, "quantization_config", None) or getattr(text_config(config), "quantization_config", None):
        return "they are quantised: take the unquantised checkpoint (bf16 or fp16) of the same model"
    if any(name.endswith(".safetensors") for name in names):
        return "take config.json and weights from the same checkpoint"
    if any(name.endswith(".gguf") for name in names):
        return "GGUF files are not read: take the model that they were made from, in safetensors"
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        return (
            "pickled weights are not read, for they can run code: load them with transformers where you trust them, "
            "and write them as safetensors with save_pretrained"
        )
    return "only safetensors are read; fetch them, or convert other formats with save_pretrained"


def _is_generation_config(folder: Path) -> bool:
    try:
        GenerationConfig.from_pretrained(str(folder))
    except Exception:  # whatever transformers has against it
        return False
    return True


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype that a checkpoint's config names; float32 if it names none."""
    fields, _ = PretrainedConfig.get_config_dict(str(path))  # only parsed: no remote code runs
    sections = [fields, fields.get("text_config") or {}]
    names = [section.get(key) for section in sections for key in ("dtype", "torch_dtype")]
    dtype = getattr(torch, str(next(filter(None, names), "float32")), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
