"""CaseOps: move ASCII letter case out of the words into four operator characters, exactly reversibly.

    encode("The NASA Launch")  ->  "⇑the ⇈nasa ⇑launch"        (⇑ = TITLE, ⇈ = ALLCAPS)
    decode(encode(text)) == text                                for every string, lone surrogates included

A word is a maximal run of ASCII letters; nothing else is ever part of one.

    operator            meaning
    TITLE    U+E001     the next letter, which starts a word, is upper case
    ALLCAPS  U+E002     every letter of the word that starts here (two or more) is upper case
    CAPNEXT  U+E003     the next letter, which is not the first of its word, is upper case
    ESC      U+E004     the next character is one of the four operators, taken literally

As a tool, streaming UTF-8 from stdin to stdout:

    python lossless_caps.py encode < text > caseops
    python lossless_caps.py decode < caseops > text             (--permissive for text sampled from a model)
"""

import argparse
import codecs
import errno
import os
import re
import sys
from functools import lru_cache
from typing import BinaryIO

TRANSFORM = "lossless_caps_caseops_v1"
TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
OPERATORS = TITLE + ALLCAPS + CAPNEXT + ESC

_OPERATOR = re.compile(f"([{OPERATORS}])")
_CAPITAL = re.compile("[A-Z]")
# The lookbehind stands after the capital, so that the engine can skip to capitals before it looks back.
_MID_WORD_CAPITAL = re.compile("[A-Z](?<=[a-z].)[A-Za-z]*")
_WORD_FROM_CAPITAL = re.compile("([A-Z][A-Za-z]*)")
_OPERATION = re.compile(f"({ESC}[{OPERATORS}]?|{ALLCAPS}[A-Za-z]*|{TITLE}[A-Za-z]?|{CAPNEXT}[A-Za-z]?)")
_ESCAPED = re.compile(f"{ESC}[{OPERATORS}]")

_STREAM_CHUNK_BYTES = 1 << 20


class CaseOpsError(ValueError):
    """Caseops text that `encode` cannot have produced: `offset` in code points, and the `reason`."""

    def __init__(self, offset: int, reason: str):
        super().__init__(f"code point {offset}: {reason}; expected text made by encode() "
                         "(decode with strict=False to accept any text)")
        self.offset = offset
        self.reason = reason


def encode(text: str) -> str:
    """Return the caseops form of `text`: no ASCII capitals, operators in their place.

    Not idempotent: operator characters in `text` are escaped, so know whether a string has been encoded.
    """
    if _OPERATOR.search(text):
        text = _OPERATOR.sub(ESC + r"\1", text)
    if _MID_WORD_CAPITAL.search(text):
        text = _MID_WORD_CAPITAL.sub(_capitals_inside_word, text)
    # Only words that begin with a capital still hold capitals; they are the odd parts.
    parts = _WORD_FROM_CAPITAL.split(text)
    parts[1::2] = map(_encode_word, parts[1::2])
    return "".join(parts)


def decode(caseops: str, strict: bool = True) -> str:
    """Return the text whose caseops form is `caseops`.

    strict   True: raise CaseOpsError, a ValueError with the offset, unless `encode` can have made the input.
             False: never raise; an operator that has nothing to act on is dropped.
    """
    parts = _OPERATION.split(caseops)
    parts[1::2] = map(_apply_operation, parts[1::2])
    text = "".join(parts)
    if strict and encode(text) != caseops:
        raise _first_violation(caseops)
    return text


def byte_weights(caseops: str) -> bytes:
    """Return one byte per code point of canonical `caseops`: the UTF-8 bytes of original text it stands for.

    An operator weighs 0, the operator character after an ESC 3, anything else its own UTF-8 length. The sum
    is the UTF-8 length of the original text (a lone surrogate, which has no UTF-8 form, counts 3).
    """
    if _ESCAPED.search(caseops):
        caseops = _ESCAPED.sub(ESC + "\ufffd", caseops)
    return caseops.translate(_WEIGHTS).encode("latin-1")


class _WeightTable(dict):
    """Map a code point to the character whose own code point is the weight, filled on demand."""

    def __missing__(self, code: int) -> str:
        weight = 1 if code < 0x80 else 2 if code < 0x800 else 3 if code < 0x10000 else 4
        self[code] = chr(weight)
        return self[code]


_WEIGHTS = _WeightTable((ord(operator), "\x00") for operator in OPERATORS)


def _capitals_inside_word(match: re.Match) -> str:
    return _CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), match[0])


@lru_cache(1 << 14)
def _encode_word(word: str) -> str:
    """Encode a word that begins with a capital."""
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    return TITLE + word[0].lower() + _CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), word[1:])


@lru_cache(1 << 14)
def _apply_operation(operation: str) -> str:
    """Apply an operator to the letters (or, for ESC, the operator) captured with it."""
    operand = operation[1:]
    return operand if operation[0] == ESC else operand.upper()


def _first_violation(caseops: str) -> CaseOpsError:
    """Find where `caseops`, known not to be canonical, first leaves the grammar."""
    # Padding makes "the next two characters" exist everywhere; "\0" is neither letter nor operator.
    padded = caseops + "\0\0"
    length = len(caseops)
    word_start = -1                       # where the current word began, operator included; -1 outside words
    in_allcaps = all_capital = False      # all_capital: TITLE word in which every letter so far is upper case
    letters = 0
    i = 0
    while i <= length:
        char, following = padded[i], padded[i + 1:i + 3]
        is_letter = "a" <= char <= "z"
        if word_start >= 0 and not is_letter and char != CAPNEXT:
            if char == TITLE or char == ALLCAPS:
                return CaseOpsError(i, f"{_NAMES[char]} inside a word")
            if all_capital and letters > 1:
                return CaseOpsError(word_start, "a fully capitalised word spelled with TITLE and CAPNEXT, "
                                                "not ALLCAPS")
            word_start = -1
        if "A" <= char <= "Z":
            return CaseOpsError(i, f"raw capital {char!r}")
        if char in OPERATORS and i + 1 >= length:
            return CaseOpsError(i, f"{_NAMES[char]} at the end of the text")

        if char == ESC:
            if following[0] not in OPERATORS:
                return CaseOpsError(i, f"ESC before {following[0]!r}, which is not an operator")
            i += 2
            continue
        if char in OPERATORS:
            if char == CAPNEXT and word_start < 0:
                return CaseOpsError(i, "CAPNEXT at the start of a word")
            if char == CAPNEXT and in_allcaps:
                return CaseOpsError(i, "CAPNEXT inside an ALLCAPS word")
            if not _is_ascii_letter(following[0]):
                return CaseOpsError(i, f"{_NAMES[char]} before {following[0]!r}, which is not a letter")
            if char == ALLCAPS and not _is_ascii_letter(following[1]):
                return CaseOpsError(i, "ALLCAPS on a one-letter word")
            if char != CAPNEXT:
                word_start, letters, in_allcaps, all_capital = i, 0, char == ALLCAPS, char == TITLE
            if not "a" <= following[0] <= "z":
                return CaseOpsError(i + 1, f"raw capital {following[0]!r}")
            letters += 1
            i += 2
            continue
        if is_letter:
            if word_start < 0:
                word_start, letters, in_allcaps, all_capital = i, 0, False, False
            all_capital = False
            letters += 1
        i += 1
    raise AssertionError("a string that the grammar accepts did not survive the round trip")


_NAMES = {TITLE: "TITLE", ALLCAPS: "ALLCAPS", CAPNEXT: "CAPNEXT", ESC: "ESC"}


def _is_ascii_letter(char: str) -> bool:
    return "a" <= char <= "z" or "A" <= char <= "Z"


def _transform_stream(source: BinaryIO, sink: BinaryIO, action: str, strict: bool) -> None:
    """Encode or decode UTF-8 from `source` to `sink`; memory is bounded by the longest run without a cut.

    A chunk ends after a character that is neither a letter nor (when decoding) an operator, because only
    there the result does not depend on what follows. Raises CaseOpsError with the offset in the whole stream,
    and ValueError with the byte offset where the input is not UTF-8.
    """
    cut = re.compile("[^A-Za-z]" if action == "encode" else f"[^A-Za-z{OPERATORS}]")
    reader = codecs.getincrementaldecoder("utf-8")()
    pending: list[str] = []
    bytes_read = code_points_done = 0

    def flush(text: str) -> None:
        nonlocal code_points_done
        try:
            result = encode(text) if action == "encode" else decode(text, strict)
        except CaseOpsError as error:
            raise CaseOpsError(code_points_done + error.offset, error.reason) from None
        code_points_done += len(text)
        sink.write(result.encode("utf-8"))

    while True:
        data = source.read(_STREAM_CHUNK_BYTES)
        bytes_read += len(data)
        try:
            text = reader.decode(data, final=not data)
        except UnicodeDecodeError as error:
            offset = bytes_read - len(error.object) + error.start
            raise ValueError(f"byte {offset}: expected UTF-8, found {error.object[error.start]:#04x} "
                             f"({error.reason}); convert the input to UTF-8 first") from None
        if not data:
            break
        end = len(text)
        while end and not cut.match(text, end - 1):
            end -= 1
        if end:
            flush("".join(pending) + text[:end])
            pending = []
        pending.append(text[end:])
    flush("".join(pending))
    sink.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line tool; return its exit code (0 done, 1 bad input, 2 bad usage, 130 interrupted)."""
    parser = argparse.ArgumentParser(prog="lossless_caps.py", description="CaseOps transform, stdin to "
                                                                          "stdout (UTF-8).")
    parser.add_argument("action", choices=("encode", "decode"))
    parser.add_argument("--permissive", action="store_true",
                        help="decode any text, dropping operators that have nothing to act on")
    options = parser.parse_args(arguments)
    if options.permissive and options.action == "encode":
        parser.error("--permissive applies to decode only; encode accepts every text")
    try:
        _transform_stream(sys.stdin.buffer, sys.stdout.buffer, options.action, strict=not options.permissive)
    except OSError as error:
        # Close stdout on our terms, or the interpreter reports the same error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):        # then the reader has left, which needs no words
            hint = "free some space" if error.errno == errno.ENOSPC else "check input and output"
            print(f"lossless_caps.py {options.action}: expected to write the result, found: "
                  f"{error.strerror}; {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lossless_caps.py {options.action}: interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        sys.stdout.flush()
        print(f"lossless_caps.py {options.action}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
