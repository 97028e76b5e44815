"""Numbers as YAML 1.2 writes them (its core schema), which PyYAML, of YAML 1.1, reads otherwise: 1e-3 as a text, 010 as eight, 1:30 as ninety.

Underscores between digits, and 0b for binary, are taken as in YAML 1.1 and Python.
"""

from __future__ import annotations

import re

import yaml

_INTEGER_TAG, _FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = {
    _INTEGER_TAG: re.compile(r"[-+]?(?:0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*)$"),
    _FLOAT_TAG: re.compile(
        r"[-+]?(?:(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
    ),
}


class NumberLoader(yaml.SafeLoader):
    """Reads numbers so; everything else as PyYAML does."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in _NUMBERS]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "").lower()
        return int(text, 0 if re.match(r"[-+]?0[obx]", text) else 10)


class NumberDumper(yaml.SafeDumper):
    """Quotes a text that either version of YAML would read as a number."""


for _tag, _pattern in _NUMBERS.items():
    for _kind in (NumberLoader, NumberDumper):
        _kind.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
NumberLoader.add_constructor(_INTEGER_TAG, NumberLoader.construct_yaml_int)
