/* SPDX-License-Identifier: Apache-2.0 */
/*
 * LD_PRELOAD for linux.uml 6.1 on CPUs whose extended state is larger than it knows (Intel AMX).
 *
 * User-Mode Linux 6.1 hands ptrace(PTRACE_SETREGSET, NT_X86_XSTATE) a buffer of 2696 bytes (up to and
 * including PKRU). x86 kernels accept only a whole XSAVE image, which with AMX is 11008 bytes, and
 * answer EFAULT (arch/x86/kernel/fpu/regset.c, xstateregs_set), so that UML panics at its first return
 * to user space ("ptrace set fp regs failed, errno = 14"). Here the short image is completed with zeroes;
 * the state bits of components beyond it are cleared, which is "initial state" to XRSTOR and true: no
 * program inside UML can have asked for AMX, since UML knows no ARCH_REQ_XCOMP_PERM.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

enum { XSTATE_BV = 512, IMAGE_MAX = 1 << 16 };

typedef long ptrace_function(int request, int pid, void *address, void *data);

/* Static: UML calls this on its small kernel stacks, on one host thread and never from an interrupt. */
static _Alignas(64) unsigned char image[IMAGE_MAX];
static size_t whole_size; /* of the host's image; 0 until the short one was refused once */

long ptrace(enum __ptrace_request request, ...)
{
	static ptrace_function *real;
	va_list arguments;
	va_start(arguments, request);
	int pid = va_arg(arguments, int);
	void *address = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);

	if (!real)
		real = (ptrace_function *)(uintptr_t)dlsym(RTLD_NEXT, "ptrace");
	if (request != PTRACE_SETREGSET || (uintptr_t)address != NT_X86_XSTATE)
		return real(request, pid, address, data);

	struct iovec *given = data;
	if (!whole_size) {
		long answer = real(request, pid, address, data);
		if (answer >= 0 || errno != EFAULT)
			return answer;
		struct iovec whole = {image, sizeof image};
		if (real(PTRACE_GETREGSET, pid, address, &whole) < 0)
			return -1;
		whole_size = whole.iov_len;
	}
	if (given->iov_len >= whole_size || given->iov_len < XSTATE_BV + sizeof(uint64_t))
		return real(request, pid, address, data);

	uint64_t present;
	memset(image, 0, whole_size);
	memcpy(image, given->iov_base, given->iov_len);
	memcpy(&present, image + XSTATE_BV, sizeof present);
	present &= 0x3ff; /* x87 .. PKRU: what fits into UML's 2696 bytes */
	memcpy(image + XSTATE_BV, &present, sizeof present);
	struct iovec whole = {image, whole_size};
	return real(request, pid, address, &whole);
}
