"""The table of seek points, version 1, as a file: whoever breaks this needs another version.

The windows are zstd frames, which another zstd may write otherwise: where there is one, only the reading is
fixed. Run as a program, it writes the golden file.
"""

import hashlib
from pathlib import Path

from fusestore.seek import SeekTable, SpanCutter

GOLDEN = Path(__file__).with_name("seek-1.bin")


def cut(window: bytes) -> bytes:
    spans = SpanCutter()
    spans.restart(10, 0, b"")
    spans.write(b"first" * 20)
    spans.restart(0x123456, 5, window)
    spans.write(b"second" * 30)
    return spans.finish("gzip", 0x123456789)


def test_version_1_is_read():
    table = SeekTable(str(GOLDEN), 280)
    assert table.compression == "gzip"
    assert table.blob_size == 0x123456789
    assert table.starts == (0, 100, 280)
    assert table.crc32s == (0xFE32EF71, 0x6A65D723)
    assert table.restart(0) == (10, 0, b"")
    assert table.restart(1) == (0x123456, 5, b"window" * 1000)
    table.close()


def test_version_1_is_written():
    assert (
        hashlib.sha256(cut(b"")).hexdigest()
        == "79a3f88ee84ca2815c911ef7821e7321324b1b6962e19d6dbd098d52ed96edb0"
    )


if __name__ == "__main__":
    GOLDEN.write_bytes(cut(b"window" * 1000))
