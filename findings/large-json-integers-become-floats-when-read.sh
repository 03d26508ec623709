#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# orjson: integers of JSON that do not fit into 64 bits.
#
# One would guess: what a library refuses to write with an error it also refuses to read with an error, or
# reads exactly; orjson.dumps(2**64) is a TypeError, "Integer exceeds 64-bit range".
#
# What happens: orjson.loads reads the same number as a float, without a word. Different numbers become equal,
# and a document that is only read and written again has others in it. As the name of a member the
# same digits stay exact. json of the standard library and msgspec read the number as it is.
#
# Why it matters: a service that takes orjson in place of json for speed passes its tests, and the first
# identifier of more than 64 bits (a hash, a UUID as an integer) is rounded to 53 bits. Whoever takes another
# decoder for untrusted text must compare values with json's, not only errors.
#
# Seen with orjson 3.13.0, msgspec 0.23.0, Python 3.11. Exit status 0: as described; 1: it has changed.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check orjson==3.13.0 msgspec==0.23.0
cat >"$place/integers.py" <<'PYTHON'
import json
import platform
import sys

import msgspec
import orjson

FIRST, SECOND = 2**64 + 1, 2**64 + 2

print(f"orjson {orjson.__version__}, msgspec {msgspec.__version__}, Python {platform.python_version()}")
try:
    orjson.dumps(FIRST)
    refused = ""
except TypeError as error:
    refused = str(error)
print(f"orjson.dumps({FIRST}): {refused or 'written'}")
read = [orjson.loads(str(number)) for number in (FIRST, SECOND)]
print(f"orjson.loads of {FIRST} and {SECOND}: {read[0]!r} and {read[1]!r}")
again = orjson.dumps(orjson.loads(f'{{"id":{FIRST}}}'))
print(f"read and written again: {again.decode()}")
name = orjson.loads(f'{{"{FIRST}":0}}')
print(f"as a member's name: {name}")
exact = [decode(str(FIRST)) for decode in (json.loads, msgspec.json.decode)]
print(f"json, msgspec: {exact[0]}, {exact[1]}")
as_described = (
    bool(refused)
    and read == [float(2**64)] * 2
    and all(type(number) is float for number in read)
    and again == b'{"id":1.8446744073709552e+19}'
    and name == {str(FIRST): 0}
    and exact == [FIRST] * 2
)
sys.exit(0 if as_described else 1)
PYTHON
"$place/venv/bin/python" "$place/integers.py"
