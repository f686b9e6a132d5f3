from __future__ import annotations

import json

import pytest

from kitty_nb.supervisor.log import readable


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            '{"type":"log","time":65004084,"level":"warn","msg":"srv  init: no API key\\n"}',
            "1.05.004.084 W srv  init: no API key",
        ),
        (
            '{"type":"fit_memory_breakdown","data":{"unit":"MiB","rows":[{"kind":"host","name":'
            '"Host","self":2140,"model":1571,"context":512,"compute":57}]}}',
            "memory on Host in MiB: model 1571, context 512, compute 57",
        ),
        ("0.00.005.944 I srv  init: plain", "0.00.005.944 I srv  init: plain"),
        ('{"type":"log","time":1,"level"', '{"type":"log","time":1,"level"'),
        ('{"type":"other"}', '{"type":"other"}'),
        (
            '{"type":"log","time":"x","level":[],"msg":1}',
            '{"type":"log","time":"x","level":[],"msg":1}',
        ),
        ('{"type":"fit_memory_breakdown","data":{"unit":1,"rows":[1]}}',) * 2,
        (json.dumps([1]), "[1]"),
        ('{"a":' * 3000,) * 2,
        ("", ""),
    ],
)
def test_a_line_reads_as_the_engine_writes_it_plain(line: str, text: str) -> None:
    assert readable(line) == text
