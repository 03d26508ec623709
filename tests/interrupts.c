/* SPDX-License-Identifier: Apache-2.0 */
/* A trace function that asks for a KeyboardInterrupt at the N-th place where one can come.
 *
 * The interpreter looks for signals where it calls something and where it jumps back, and nowhere
 * else (CHECK_EVAL_BREAKER, Python/ceval.c). A trace function in Python that raises would do so
 * between a lock's __exit__ and what calls it, where no signal ever comes; this one sets the flag
 * that a signal's handler in C sets, and the interpreter raises where it would. Needs no Python.h. */

#include <stddef.h>
#include <string.h>

typedef struct object Object;
extern int PyErr_SetInterruptEx(int);
extern int PyThreadState_SetAsyncExc(unsigned long, Object *);
extern unsigned long PyThread_get_thread_ident(void);
extern void *PyFrame_GetCode(Object *);
extern int PyFrame_GetLasti(Object *);
extern Object *PyCode_GetCode(void *);
extern char *PyBytes_AsString(Object *);
extern Object *PyObject_GetAttrString(void *, const char *);
extern int PyObject_SetAttrString(Object *, const char *, Object *);
extern Object *PyBool_FromLong(long);
extern const char *PyUnicode_AsUTF8(Object *);
extern void Py_DecRef(void *);

enum { CALL = 0, OPCODE = 7, SIGINT_NUMBER = 2, WATCHED = 64 };

long seen, target;          /* places passed, and the one at which to interrupt */
Object *raised;             /* in whatever thread this is, as another one would; or NULL: SIGINT */
char stops[256];            /* opcodes at which the interpreter looks */
const char *below[WATCHED]; /* files and directories whose code counts */

static int is_watched(void *code) {
    Object *name = PyObject_GetAttrString(code, "co_filename");
    const char *text = PyUnicode_AsUTF8(name);
    int found = 0;
    for (int i = 0; below[i] != NULL && !found; i++)
        found = strncmp(text, below[i], strlen(below[i])) == 0;
    Py_DecRef(name);
    return found;
}

int trace(Object *self, Object *frame, int what, Object *argument) {
    (void)self, (void)argument;
    if (what != CALL && what != OPCODE)
        return 0;
    void *code = PyFrame_GetCode(frame);
    if (what == CALL) {
        if (is_watched(code)) {
            Object *yes = PyBool_FromLong(1);
            PyObject_SetAttrString(frame, "f_trace_opcodes", yes);
            Py_DecRef(yes);
        }
    } else {
        int at = PyFrame_GetLasti(frame);
        Object *bytes = PyCode_GetCode(code);
        if (at >= 0 && stops[(unsigned char)PyBytes_AsString(bytes)[at]] && ++seen == target) {
            if (raised != NULL)
                PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), raised);
            else
                PyErr_SetInterruptEx(SIGINT_NUMBER);
        }
        Py_DecRef(bytes);
    }
    Py_DecRef(code);
    return 0;
}
