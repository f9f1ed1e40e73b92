"""Bytes of text files as lines or pieces of text: UTF-8 with or without byte order mark, gzip.

What is no such file (UTF-16, a packed or binary format, a Git LFS pointer, a damaged gzip file) is
told apart here, in one line with the place.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from trainers.data.records import DataError, DataFile, RowError

BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
HEAD_BYTES = 64
PARQUET_MARK = b"PAR1"
# First bytes of what people give under a wrong name, and what to do about it.
OTHER_KINDS = (
    (b"\x1f\x8b", "gzip; let its name end in .gz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; unpack it"),
    (b"\xfd7zXZ", "packed with xz; unpack it"),
    (b"BZh", "packed with bzip2; unpack it"),
    (b"PK\x03\x04", "a zip archive (or Excel); unpack it, or save it as csv"),
    (PARQUET_MARK, "parquet; let its name end in .parquet"),
    (b"ARROW1", "Arrow; give the folder that save_to_disk wrote, or write it as parquet"),
    (b"version https://git-lfs", "a Git LFS pointer and not the data; run: git lfs pull"),
)


@contextmanager
def opened(file: DataFile) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The file's bytes, unpacked where its name ends in .gz, behind the byte order mark.

    Raises: DataError: it cannot be opened, is not UTF-8 text by its first bytes, or, also while it
        is read, is damaged gzip.
    """
    try:
        with gzip.open(file.path) if file.is_gzip else file.path.open("rb") as stream:
            head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
            _check_text(file, head)
            stream.read(len(BOM) if head.startswith(BOM) else 0)
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file.name}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror or error}") from error


def _check_text(file: DataFile, head: bytes) -> None:
    check_kind(file, head)
    if head.startswith(UTF16_MARKS) or b"\0" in head:
        raise DataError(f"{file.name}:1: must be UTF-8 text, is UTF-16 or binary; save it as UTF-8")


def check_kind(file: DataFile, head: bytes) -> None:
    """Raises: DataError: the first bytes are those of a kind of file that this is not."""
    kind = next((kind for magic, kind in OTHER_KINDS if head.startswith(magic)), None)
    if kind:
        raise DataError(f"{file.name}: is {kind}")


def file_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """Line numbers (from 1) and raw lines with their ends. Raises: DataError: as `opened`."""
    with opened(file) as stream:
        yield from enumerate(stream, start=1)


def file_chunks(file: DataFile, chunk_bytes: int) -> Iterator[bytes]:
    """The bytes in chunks of at most `chunk_bytes`. Raises: DataError: as `opened`."""
    with opened(file) as stream:
        while chunk := stream.read(chunk_bytes):
            yield chunk


def decoded_line(line: bytes) -> str:
    """A line's text. Raises: RowError: not UTF-8; names the byte and its column."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(_not_utf8(line[error.start], error.start + 1)) from error


def _not_utf8(byte: int, column: int) -> str:
    return f"must be UTF-8, has byte 0x{byte:02X} at column {column}; save the file as UTF-8"


def text_pieces(name: str, chunks: Iterable[bytes]) -> Iterator[str]:
    """The text of chunks that may cut a character anywhere.

    Raises: DataError: not UTF-8; names the line, the byte and its column. What stands before it is
        given first, so that an earlier fault is found first.
    """
    line, column, kept = 1, 0, b""
    for chunk in chain(chunks, (b"",)):  # an empty chunk is the end
        data, is_end, fault = kept + chunk, not chunk, None
        try:
            text, used = codecs.utf_8_decode(data, "strict", is_end)
        except UnicodeDecodeError as error:
            fault = error.start
            text, used = codecs.utf_8_decode(data[:fault], "strict", True)
        yield text
        line += data.count(b"\n", 0, used)
        newline = data.rfind(b"\n", 0, used)
        column = used - newline - 1 if newline >= 0 else column + used
        if fault is not None:
            raise DataError(f"{name}:{line}: {_not_utf8(data[fault], column + 1)}")
        kept = data[used:]
