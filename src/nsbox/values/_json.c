/* SPDX-License-Identifier: Apache-2.0
 *
 * What json.dumps says of plain values in a fraction of the time: the same bytes, or None. nsbox/values/json_text.py asks
 * json then, which tells what is wrong, too. And a first look at how deep a text is nested.
 *
 * Plain are None, bool, int of 64 bits, finite float, str, and list, tuple and dict of these with keys that
 * are str: no subclass of any. So no code of theirs runs here, and nothing changes while it is read.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bytes are looked at eight at a time, the first as the lowest"
#endif

enum {
    DEEPEST = 200,          /* lists and objects in one another; json recurses deeper, and finds circles */
    FIRST = 1 << 10,        /* bytes */
    LARGEST_ESCAPE = 12,    /* of a character: two surrogates */
    KNOWN = 16,             /* keys that are found where they were put before */
};

struct known {
    PyObject *key;
    size_t begin, size;     /* in the text, with what is behind it */
};

struct text {
    char *begin, *at, *end;
    int is_ascii;           /* as json's ensure_ascii */
    int is_out;             /* of memory */
    struct known known[KNOWN];
};

/* Return whether there is room for `size` more bytes. */
static int grow(struct text *text, size_t size)
{
    size_t used = text->at - text->begin, all = text->end - text->begin;
    if (size > SIZE_MAX / 4 - used) {
        text->is_out = 1;
        return 0;
    }
    while (all < used + size)
        all = all ? 2 * all : FIRST;
    char *begin = realloc(text->begin, all);
    if (begin == NULL) {
        text->is_out = 1;
        return 0;
    }
    text->begin = begin;
    text->at = begin + used;
    text->end = begin + all;
    return 1;
}

static inline int has_room(struct text *text, size_t size)
{
    return (size_t)(text->end - text->at) >= size || grow(text, size);
}

static inline int put(struct text *text, const char *words, size_t size)
{
    if (!has_room(text, size))
        return 0;
    memcpy(text->at, words, size);
    text->at += size;
    return 1;
}

static char *put_digits(char *at, uint64_t number)
{
    int size = 1;
    for (uint64_t ten = 10; number >= ten && size < 20; size++)
        ten *= 10;
    for (int i = size; i--; number /= 10)
        at[i] = '0' + number % 10;
    return at + size;
}

static int put_int(struct text *text, PyObject *value)
{
    int is_large;
    long long number = PyLong_AsLongLongAndOverflow(value, &is_large);
    if (is_large || !has_room(text, 21))
        return 0;
    uint64_t size = number;
    if (number < 0) {
        *text->at++ = '-';
        size = -size;
    }
    text->at = put_digits(text->at, size);
    return 1;
}

/* As repr does.
 *
 * n / 10**k is rounded correctly, since n and 10**k are exact: when it is the number, then n with k decimals is read
 * as that. It has 15 digits at most, of which no two that differ are read as one number, so it is the
 * shortest, for the first k there is, and n / 10**k is not rounded up to a whole number. repr has an exponent below 1e-4 and from 1e16 on. */
static int put_float(struct text *text, PyObject *value)
{
    static const double powers[] = {1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6};
    double number = PyFloat_AsDouble(value), size = number < 0 ? -number : number;
    if (!(size <= 1.7976931348623157e308)) /* nor a number that is none */
        return 0;
    for (int k = 0; size >= 1e-4 && k < 7; k++) {
        double shifted = size * powers[k];
        if (shifted >= 1e15)
            break;
        uint64_t n = (uint64_t)(shifted + 0.5);
        if ((double)n / powers[k] != size)
            continue;
        if (!has_room(text, 24))
            return 0;
        uint64_t power = (uint64_t)powers[k], whole = (uint64_t)size, rest = n - whole * power;
        char *at = text->at;
        if (number < 0)
            *at++ = '-';
        at = put_digits(at, whole);
        *at++ = '.';
        for (uint64_t place = power / 10; place > 1 && rest < place; place /= 10)
            *at++ = '0';
        text->at = put_digits(at, rest);
        return 1;
    }
    char *words = PyOS_double_to_string(number, 'r', 0, Py_DTSF_ADD_DOT_0, NULL);
    if (words == NULL) {
        text->is_out = 1;
        return 0;
    }
    int is_done = put(text, words, strlen(words));
    PyMem_Free(words);
    return is_done;
}

static char *put_escape(char *at, unsigned unit)
{
    static const char hex[] = "0123456789abcdef";
    *at++ = '\\';
    *at++ = 'u';
    for (int shift = 12; shift >= 0; shift -= 4)
        *at++ = hex[unit >> shift & 15];
    return at;
}

/* Put what stands at `p`, which is no plain character; return what is behind it. */
static const unsigned char *escape(struct text *text, const unsigned char *p)
{
    static const char named[] = "\"\"\\\\\bb\ff\nn\rr\tt";
    unsigned c = *p++;
    for (const char *pair = named; c < 0x80 && *pair; pair += 2)
        if ((unsigned char)*pair == c) {
            *text->at++ = '\\';
            *text->at++ = pair[1];
            return p;
        }
    if (c >= 0x80) { /* UTF-8 of CPython's own: nothing of it is missing or wrong */
        int more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : 1;
        c &= 0x3f >> more;
        while (more--)
            c = c << 6 | (*p++ & 0x3f);
    }
    if (c >= 0x10000) {
        text->at = put_escape(text->at, 0xd800 | (c - 0x10000) >> 10);
        c = 0xdc00 | (c & 0x3ff);
    }
    text->at = put_escape(text->at, c);
    return p;
}

/* Of eight bytes at once: a bit in each that is no plain character's, but above the lowest perhaps in others, too. */
static inline uint64_t odd_of(uint64_t eight, int is_ascii)
{
    const uint64_t ones = 0x0101010101010101, high = ones << 7;
    uint64_t quotes = eight ^ ones * '"', slashes = eight ^ ones * '\\';
    uint64_t found = ((eight - ones * ' ') & ~eight) | ((quotes - ones) & ~quotes) | ((slashes - ones) & ~slashes);
    return (is_ascii ? found | eight | (eight + ones) : found) & high;
}

static int put_string(struct text *text, PyObject *value)
{
    Py_ssize_t size;
    const unsigned char *p = (const unsigned char *)PyUnicode_AsUTF8AndSize(value, &size);
    if (p == NULL) { /* a lone surrogate */
        PyErr_Clear();
        return 0;
    }
    const unsigned char *end = p + size;
    int is_ascii = text->is_ascii;
    unsigned char last = is_ascii ? 0x7e : 0xff;
    if (!has_room(text, size + 2))
        return 0;
    char *at = text->at; /* kept out of memory, which is what is written to */
    *at++ = '"';
    for (;;) {
        for (uint64_t eight, odd = 0; end - p >= 8 && !odd;) {
            memcpy(&eight, p, 8);
            memcpy(at, &eight, 8);
            odd = odd_of(eight, is_ascii);
            int plain = odd ? __builtin_ctzll(odd) / 8 : 8;
            p += plain;
            at += plain;
        }
        while (p < end && *p >= ' ' && *p <= last && *p != '"' && *p != '\\')
            *at++ = *p++;
        text->at = at;
        if (p == end)
            return put(text, "\"", 1);
        if (!has_room(text, LARGEST_ESCAPE + (end - p) + 1))
            return 0;
        p = escape(text, p);
        at = text->at;
    }
}

static int put_value(struct text *text, PyObject *value, int depth);

static int put_list(struct text *text, PyObject *value, int depth)
{
    int is_list = PyList_CheckExact(value);
    Py_ssize_t size = is_list ? PyList_Size(value) : PyTuple_Size(value);
    if (!put(text, "[", 1))
        return 0;
    for (Py_ssize_t i = 0; i < size; i++) {
        PyObject *item = is_list ? PyList_GetItem(value, i) : PyTuple_GetItem(value, i);
        if ((i && !put(text, ", ", 2)) || !put_value(text, item, depth))
            return 0;
    }
    return put(text, "]", 1);
}

static int put_dict(struct text *text, PyObject *value, int depth)
{
    PyObject *key, *item;
    Py_ssize_t i = 0;
    int is_first = 1;
    if (!put(text, "{", 1))
        return 0;
    while (PyDict_Next(value, &i, &key, &item)) {
        if (!is_first && !put(text, ", ", 2))
            return 0;
        is_first = 0;
        struct known *known = &text->known[(uintptr_t)key / 64 % KNOWN];
        if (known->key == key) {
            if (!has_room(text, known->size))
                return 0;
            memcpy(text->at, text->begin + known->begin, known->size);
            text->at += known->size;
        } else {
            size_t begin = text->at - text->begin;
            if (!PyUnicode_CheckExact(key) || !put_string(text, key) || !put(text, ": ", 2))
                return 0;
            *known = (struct known){key, begin, text->at - text->begin - begin};
        }
        if (!put_value(text, item, depth))
            return 0;
    }
    return put(text, "}", 1);
}

/* Return whether it is plain, and there is memory for it. */
static int put_value(struct text *text, PyObject *value, int depth)
{
    if (PyUnicode_CheckExact(value))
        return put_string(text, value);
    if (PyLong_CheckExact(value))
        return put_int(text, value);
    if (PyFloat_CheckExact(value))
        return put_float(text, value);
    if (value == Py_None)
        return put(text, "null", 4);
    if (value == Py_True)
        return put(text, "true", 4);
    if (value == Py_False)
        return put(text, "false", 5);
    if (depth == DEEPEST)
        return 0;
    if (PyDict_CheckExact(value))
        return put_dict(text, value, depth + 1);
    if (PyList_CheckExact(value) || PyTuple_CheckExact(value))
        return put_list(text, value, depth + 1);
    return 0;
}

static PyObject *encode(PyObject *module, PyObject *value, int is_ascii)
{
    struct text text = {.is_ascii = is_ascii};
    PyObject *result = NULL;
    if (put_value(&text, value, 0))
        result = PyBytes_FromStringAndSize(text.begin, text.at - text.begin);
    else if (text.is_out)
        PyErr_NoMemory();
    else
        result = Py_NewRef(Py_None);
    free(text.begin);
    return result;
}

static PyObject *py_encode(PyObject *module, PyObject *value)
{
    return encode(module, value, 0);
}

static PyObject *py_encode_ascii(PyObject *module, PyObject *value)
{
    return encode(module, value, 1);
}

/* Of each byte of eight that is `byte` a bit, the first byte's the lowest. */
static inline unsigned bits_of(uint64_t eight, unsigned char byte)
{
    const uint64_t ones = 0x0101010101010101, low = ones * 0x7f;
    uint64_t other = eight ^ ones * byte;
    uint64_t found = ~(((other & low) + low) | other | low); /* the highest bit of each that is equal */
    return (found >> 7) * 0x0102040810204080 >> 56;
}

/* Return whether brackets that are in no string are nested at most `most` deep; perhaps 0 where they are.
 * The bytes are hostile. A parser has the same strings as long as it reads on. */
static int is_shallow(const unsigned char *p, size_t size, Py_ssize_t most)
{
    static const unsigned char counts[] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
    unsigned is_inside = 0, is_escaped = 0; /* is the next byte in a string, and behind a backslash there? */
    Py_ssize_t depth = 0;
    for (; size >= 8; size -= 8, p += 8) {
        uint64_t eight;
        memcpy(&eight, p, 8);
        unsigned inside = 0, quotes = bits_of(eight, '"');
        if (is_escaped || bits_of(eight, '\\')) {
            for (int i = 0; i < 8; i++) {
                inside |= is_inside << i;
                if (is_escaped)
                    is_escaped = 0;
                else if (p[i] == '"')
                    is_inside ^= 1;
                else
                    is_escaped = is_inside && p[i] == '\\';
            }
        } else {
            inside = quotes;
            inside ^= inside << 1;
            inside ^= inside << 2;
            inside = (inside ^ inside << 4 ^ -is_inside) & 0xff;
            is_inside = inside >> 7;
        }
        eight |= 0x2020202020202020; /* [ is {, and ] is } */
        unsigned opened = bits_of(eight, '{') & ~inside, closed = bits_of(eight, '}') & ~inside;
        depth += counts[opened & 15] + counts[opened >> 4];
        if (depth > most)
            return 0;
        depth -= counts[closed & 15] + counts[closed >> 4];
    }
    return depth + (Py_ssize_t)size <= most;
}

static PyObject *py_is_shallow(PyObject *module, PyObject *args)
{
    Py_buffer data;
    Py_ssize_t most;
    if (!PyArg_ParseTuple(args, "y*n", &data, &most))
        return NULL;
    int is = is_shallow(data.buf, data.len, most);
    PyBuffer_Release(&data);
    return PyBool_FromLong(is);
}

static PyMethodDef methods[] = {
    {"is_shallow", py_is_shallow, METH_VARARGS, "is_shallow(data, most): nested at most so deep, as far as is seen at once?"},
    {"encode", py_encode, METH_O, "encode(value): JSON in UTF-8, or None"},
    {"encode_ascii", py_encode_ascii, METH_O, "encode_ascii(value): JSON in ASCII, or None"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_json", NULL, 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__json(void)
{
    return PyModuleDef_Init(&module);
}
