"""Two files of hashes beside each other."""

import json
from collections.abc import Mapping
from pathlib import Path


def compare(before: Path, after: Path) -> int:
    """Print every key that differs, is missing or is new; 1 if there is any, else 0."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    for name in ("processor", "torch"):
        if old["header"][name] != new["header"][name]:
            said = f"{old['header'][name]} and {new['header'][name]}"
            print(f"{name} differs: {said}; hashes are comparable on one machine only")
    found = differences(old["hashes"], new["hashes"])
    for line in found:
        print(line)
    print(f"{len(found)} of {len(old['hashes'] | new['hashes'])} keys differ")
    return 1 if found else 0


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Name the keys that are not the same in both, in their order.

    Example:
        >>> differences({"a": "1", "b": "2"}, {"b": "3", "c": "4"})
        ['missing  a', 'differs  b', 'new      c']
    """
    found = []
    for key in sorted({*old, *new}):
        if key not in new:
            found.append(f"missing  {key}")
        elif key not in old:
            found.append(f"new      {key}")
        elif old[key] != new[key]:
            found.append(f"differs  {key}")
    return found
