#!/usr/bin/env python3
"""Rename an export: export.py MODULE OLD NEW OUTPUT

Go's reactors have their initialisation in `_initialize`; waPC hosts call `_start`.
"""

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from annotate import leb128, read_leb128  # noqa: E402

EXPORT_SECTION = 7


def renamed(section, old, new):
    """The content of an export section with another name in it."""
    count, at = read_leb128(section, 0)
    out = bytearray(leb128(count))
    found = 0
    for _ in range(count):
        length, text = read_leb128(section, at)
        name = section[text : text + length]
        _, end = read_leb128(section, text + length + 1)
        found += name == old
        name = new if name == old else name
        out += leb128(len(name)) + name + section[text + length : end]
        at = end
    if found != 1:
        raise ValueError(f"{found} exports are named {old.decode()}")
    return bytes(out)


def main(module, old, new, output):
    data = pathlib.Path(module).read_bytes()
    out = bytearray(data[:8])
    at = 8
    while at < len(data):
        size, body = read_leb128(data, at + 1)
        section = data[body : body + size]
        if data[at] == EXPORT_SECTION:
            section = renamed(section, old.encode(), new.encode())
        out += data[at : at + 1] + leb128(len(section)) + section
        at = body + size
    pathlib.Path(output).write_bytes(out)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError, IndexError) as error:
        sys.exit(f"export.py: {sys.argv[1]}: {error}")
