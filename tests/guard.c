// What torch allocates on the CPU, so that the byte after it (GUARD=start: before it) cannot be touched:
// unlike the address sanitizer's, this guard holds for masked, streaming and gathering instructions too.
// CONTRIBUTING.md says how.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const size_t page = 4096, reserved = (size_t)1 << 42;  // addresses, none of which is used twice
static char* arena;
static uint32_t* pages;  // of the allocation that begins in a page
static size_t used;
static int at_start;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

static void fail(const char* what) {
    perror(what);
    abort();
}

__attribute__((constructor)) static void reserve(void) {
    const char* mode = getenv("GUARD");
    at_start = mode != NULL && strcmp(mode, "start") == 0;
    pages = mmap(NULL, reserved / page * sizeof(*pages), PROT_READ | PROT_WRITE, flags, -1, 0);
    arena = mmap(NULL, reserved, PROT_NONE, flags, -1, 0);
    if (arena == MAP_FAILED || pages == MAP_FAILED) fail("guard: mmap");
}

// torch's allocator asks for 64 bytes of alignment and no kernel may rely on it: here an element's is kept.
int posix_memalign(void** out, size_t alignment, size_t bytes) {
    (void)alignment;
    if (arena == NULL) reserve();
    const size_t count = (bytes + page - 1) / page + (bytes == 0);
    pthread_mutex_lock(&lock);
    char* const base = arena + page + used;
    used += (count + 1) * page;
    pthread_mutex_unlock(&lock);
    if (used + page > reserved || mprotect(base, count * page, PROT_READ | PROT_WRITE))
        fail("guard: mprotect");
    char* const p = at_start ? base : base + count * page - (bytes ? bytes : 1);
    memset(base, 0xff, count * page);  // NaN, where what nobody wrote is read
    pages[(size_t)(p - arena) / page] = (uint32_t)count;
    *out = p;
    return 0;
}

void free(void* p) {
    static void (*next)(void*);
    const size_t offset = (size_t)((char*)p - arena);
    if (arena == NULL || (char*)p < arena || offset >= reserved) {
        if (next == NULL) next = (void (*)(void*))dlsym(RTLD_NEXT, "free");
        next(p);
        return;
    }
    const size_t count = pages[offset / page];
    pages[offset / page] = 0;
    char* const base = arena + offset / page * page;
    if (count == 0) fail("guard: freed twice");
    if (mmap(base, count * page, PROT_NONE, flags | MAP_FIXED, -1, 0) == MAP_FAILED) fail("guard: mmap");
}
