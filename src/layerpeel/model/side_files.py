"""The files beside a checkpoint's weights: which of them hold of its student, too, and are carried over."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

from layerpeel.storage.files import write_whole

# By their names in lower case; what a removal makes untrue (weights and their index, other formats of them,
# quantisation, results, the card) is none of them.
CARRIED = (
    *("license*", "licence*", "notice*", "copying*", "copyright*", "*_license*", "*-license*", "third_party*"),
    *("*use_policy*", "terms_of_*", "*_terms*", "authors*", "attribution*", "citation*"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken"),
    *("*.spm", "spiece.model", "sentencepiece*", "tekken.json", "*.bpe", "*.model", "bpe.codes", "normalizer.json"),
    *("chat_template*", "*.jinja", "generation_config.json"),
    *("*processor_config.json", "image_processor*.json", "feature_extractor*.json"),
)
CARRIED_FOLDERS = ("additional_chat_templates",)


def in_any_case(pattern: str) -> str:
    """A glob that matches a name also where its letters are capitals."""
    return "".join(f"[{letter}{letter.upper()}]" if letter.isalpha() else letter for letter in pattern)


def is_carried(name: str, *, code: bool = False) -> bool:
    """Whether a file holds of the student, too, by its name.

    Args:
        code: whether Python files do.
    """
    lower = name.lower()
    return any(fnmatch.fnmatchcase(lower, pattern) for pattern in CARRIED) or (code and lower.endswith(".py"))


def carry_files(origin: Path, folder: Path, *, code: bool = False) -> list[str]:
    """Copies what holds of the student, too, with the modes of new files; gives the names of what was carried.

    Args:
        code: whether the checkpoint's own Python files may run, and so are carried.
    """
    carried = []
    for path in sorted(origin.iterdir()):
        if path.is_file() and is_carried(path.name, code=code):
            shutil.copyfile(path, folder / path.name)
            carried.append(path.name)
        elif path.is_dir() and path.name in CARRIED_FOLDERS:
            (folder / path.name).mkdir(exist_ok=True)
            for each in sorted(file for file in path.iterdir() if file.is_file()):
                shutil.copyfile(each, folder / path.name / each.name)
            carried.append(f"{path.name}/")
    config = folder / "tokenizer_config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        if drop_absent_code(content, folder):
            write_whole(config, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return carried


def left_files(origin: Path, *, code: bool = False) -> list[str]:
    """The names of what is not carried, without the weights themselves, the config and hidden files."""
    names = [path.name for path in sorted(origin.iterdir()) if path.is_file()]
    not_listed = ("config.json", "model.safetensors.index.json")
    return [
        name
        for name in names
        if not (
            is_carried(name, code=code) or name in not_listed or name.startswith(".") or name.endswith(".safetensors")
        )
    ]


def drop_absent_code(config: dict[str, Any], folder: Path) -> bool:
    """Takes out of a config what names code in files that are not in its folder; says whether there was any.

    Code of another repository of the hub (`owner/name--module.Class`) stays named.
    """
    classes = config.get("auto_map")
    if not isinstance(classes, dict):
        return False
    present = {name: value for name, value in classes.items() if _is_there(value, folder)}
    if present == classes:
        return False
    config["auto_map"] = present
    if not present:
        del config["auto_map"]
    return True


def _is_there(value: Any, folder: Path) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(
        "--" in name or (folder / f"{name.partition('.')[0]}.py").is_file() for name in names if isinstance(name, str)
    )
