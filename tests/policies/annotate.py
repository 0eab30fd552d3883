#!/usr/bin/env python3
"""Write a policy with its metadata: annotate.py MODULE METADATA OUTPUT

Copies the module and appends the custom section that hosts read. A section of that
name already in the module is left out, because hosts stop at the first one.
"""

import json
import pathlib
import sys

SECTION = b"io.kubewarden.metadata"
MODES = ("kubewarden-wapc", "opa", "gatekeeper", "wasi")
RULE_LISTS = ("apiGroups", "apiVersions", "resources", "operations")


def leb128(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_leb128(data, at):
    """The unsigned number at `at` and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def without_section(module, name):
    out = bytearray(module[:8])
    at = 8
    while at < len(module):
        size, body = read_leb128(module, at + 1)
        end = body + size
        if end > len(module):
            raise ValueError("the last section is cut short")
        if module[at] == 0:
            length, text = read_leb128(module, body)
            keep = module[text : text + length] != name
        else:
            keep = True
        if keep:
            out += module[at:end]
        at = end
    return bytes(out)


def check(metadata):
    if not isinstance(metadata.get("mutating"), bool):
        raise ValueError("mutating must be true or false")
    mode = metadata.get("executionMode", MODES[0])
    if mode not in MODES:
        raise ValueError(f"unknown executionMode {mode}")
    version = "v1" if mode == MODES[0] else "Unknown"
    if metadata.get("protocolVersion") != version:
        raise ValueError(f"protocolVersion must be {version} with {mode}")
    if not isinstance(metadata.get("rules"), list):
        raise ValueError("rules must be a list")
    for rule in metadata["rules"]:
        if not all(rule.get(key) for key in RULE_LISTS):
            raise ValueError("a rule needs non-empty " + ", ".join(RULE_LISTS))


def main(module, metadata, output):
    data = pathlib.Path(module).read_bytes()
    if data[:8] != b"\0asm\1\0\0\0":
        raise ValueError("not a core WebAssembly module")
    fields = json.loads(pathlib.Path(metadata).read_text(encoding="utf-8"))
    check(fields)
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    body = leb128(len(SECTION)) + SECTION + text
    section = b"\0" + leb128(len(body)) + body
    pathlib.Path(output).write_bytes(without_section(data, SECTION) + section)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError, IndexError) as error:
        sys.exit(f"annotate.py: {sys.argv[1]}: {error}")
