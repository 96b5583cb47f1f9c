/* Preloaded before the C library: fails chosen calls of the system, as bench/faults/library.py says in a shared file. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, READ, WRITE, SYNC, TRUNCATE, RENAME, MAP, LARGE_MEMORY, THREAD, ALLOCATE, LOCK, MKDIR };
enum { SHORT = -1, END = -2 };
/* Other kinds are numbers of errors. */
enum { LARGE = 2 << 20 };
/* Python itself waits for ever for a thread of its that got no memory for its first objects. */

struct faults {
    atomic_int call;       /* which call, 0 for none */
    int kind;              /* SHORT, END or the number of an error */
    long first, times;     /* the first matching call that fails, from 1 on, and how many do */
    atomic_long seen, hit; /* matching calls, and those that failed */
    char pattern[200];     /* what the path holds; calls without a path match every pattern */
    atomic_long all[16];   /* matching calls of every kind, where `call` is EVERY and none fails */
};
enum { EVERY = -1 };

static struct faults *faults;

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("SLIMOE_FAULTS");
    int file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *shared = (void *)syscall(SYS_mmap, NULL, sizeof(struct faults), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED) faults = shared;
    syscall(SYS_close, file);
}

static int is_due(int call, const char *path) {
    int armed = faults ? atomic_load(&faults->call) : 0;
    if (armed != call && armed != EVERY) return 0;
    if (path && !strstr(path, faults->pattern)) return 0;
    if (armed == EVERY) {
        atomic_fetch_add(&faults->all[call], 1);
        return 0;
    }
    long n = atomic_fetch_add(&faults->seen, 1) + 1;
    if (n < faults->first || n - faults->first >= faults->times) return 0;
    atomic_fetch_add(&faults->hit, 1);
    return faults->kind;
}

static int is_due_at(int call, int file) {
    char link[64], path[PATH_MAX];
    int armed = faults ? atomic_load(&faults->call) : 0;
    if (armed != call && armed != EVERY) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    errno = before;
    path[n < 0 ? 0 : n] = 0;
    return is_due(call, path);
}

static size_t half(size_t n) { return n > 1 ? n / 2 : n; }

/* The result for a call that fails, or goes on with fewer bytes. */
#define FAIL_OR_CUT(kind, count)              \
    if ((kind) == END) return 0;              \
    if ((kind) > 0) return errno = (kind), -1; \
    if ((kind) == SHORT) (count) = half(count);

#define FAIL(kind) \
    if ((kind) > 0) return errno = (kind), -1;

#define TRANSFER(call, name, buffer)                                                                   \
    ssize_t name(int file, buffer data, size_t n) {                                                    \
        int kind = is_due_at(call, file);                                                              \
        FAIL_OR_CUT(kind, n)                                                                           \
        return ((ssize_t (*)(int, buffer, size_t))real(#name))(file, data, n);                         \
    }
#define TRANSFER_AT(call, name, buffer)                                                                \
    ssize_t name(int file, buffer data, size_t n, off_t offset) {                                      \
        int kind = is_due_at(call, file);                                                              \
        FAIL_OR_CUT(kind, n)                                                                           \
        return ((ssize_t (*)(int, buffer, size_t, off_t))real(#name))(file, data, n, offset);          \
    }
/* Of several buffers a short call fills half of the first. */
#define TRANSFER_MANY_AT(call, name)                                                                   \
    ssize_t name(int file, const struct iovec *data, int n, off_t offset) {                            \
        int kind = is_due_at(call, file);                                                              \
        if (kind == SHORT && n > 0) {                                                                  \
            struct iovec cut = {data[0].iov_base, half(data[0].iov_len)};                              \
            return ((ssize_t (*)(int, const struct iovec *, int, off_t))real(#name))(file, &cut, 1, offset); \
        }                                                                                              \
        size_t none = 0;                                                                               \
        FAIL_OR_CUT(kind, none)                                                                        \
        return ((ssize_t (*)(int, const struct iovec *, int, off_t))real(#name))(file, data, n, offset); \
    }

TRANSFER(READ, read, void *)
TRANSFER_AT(READ, pread, void *)
TRANSFER_AT(READ, pread64, void *)
TRANSFER_MANY_AT(READ, preadv)
TRANSFER_MANY_AT(READ, preadv64)
TRANSFER(WRITE, write, const void *)
TRANSFER_AT(WRITE, pwrite, const void *)
TRANSFER_AT(WRITE, pwrite64, const void *)
TRANSFER_MANY_AT(WRITE, pwritev)
TRANSFER_MANY_AT(WRITE, pwritev64)

/* Python reads and writes several buffers through these where it knows of flags. */
#define TRANSFER_FLAGS(call, name)                                                                     \
    ssize_t name(int file, const struct iovec *data, int n, off_t offset, int flags) {                 \
        int kind = is_due_at(call, file);                                                              \
        if (kind == SHORT && n > 0) {                                                                  \
            struct iovec cut = {data[0].iov_base, half(data[0].iov_len)};                              \
            return ((ssize_t (*)(int, const struct iovec *, int, off_t, int))real(#name))(file, &cut, 1, offset, flags); \
        }                                                                                              \
        size_t none = 0;                                                                               \
        FAIL_OR_CUT(kind, none)                                                                        \
        return ((ssize_t (*)(int, const struct iovec *, int, off_t, int))real(#name))(file, data, n, offset, flags); \
    }
TRANSFER_FLAGS(READ, preadv2)
TRANSFER_FLAGS(READ, preadv64v2)
TRANSFER_FLAGS(WRITE, pwritev2)
TRANSFER_FLAGS(WRITE, pwritev64v2)

#define OPENS(name)                                                                                    \
    int name(const char *path, int flags, ...) {                                                       \
        va_list rest;                                                                                  \
        va_start(rest, flags);                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                            \
        va_end(rest);                                                                                  \
        int kind = is_due(OPEN, path);                                                                 \
        FAIL(kind)                                                                                     \
        return ((int (*)(const char *, int, mode_t))real(#name))(path, flags, mode);                   \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                                                 \
    int name(int directory, const char *path, int flags, ...) {                                        \
        va_list rest;                                                                                  \
        va_start(rest, flags);                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                            \
        va_end(rest);                                                                                  \
        int kind = is_due(OPEN, path);                                                                 \
        FAIL(kind)                                                                                     \
        return ((int (*)(int, const char *, int, mode_t))real(#name))(directory, path, flags, mode);   \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

#define ON_FILE(call, name)                                                                            \
    int name(int file) {                                                                               \
        int kind = is_due_at(call, file);                                                              \
        FAIL(kind)                                                                                     \
        return ((int (*)(int))real(#name))(file);                                                      \
    }
ON_FILE(SYNC, fsync)
ON_FILE(SYNC, fdatasync)

#define TRUNCATES(name)                                                                                \
    int name(int file, off_t length) {                                                                 \
        int kind = is_due_at(TRUNCATE, file);                                                          \
        FAIL(kind)                                                                                     \
        return ((int (*)(int, off_t))real(#name))(file, length);                                       \
    }
TRUNCATES(ftruncate)
TRUNCATES(ftruncate64)

/* These give the error in place of setting errno. */
#define ALLOCATES(name)                                                                                \
    int name(int file, off_t offset, off_t length) {                                                   \
        int kind = is_due_at(ALLOCATE, file);                                                          \
        return kind > 0 ? kind : ((int (*)(int, off_t, off_t))real(#name))(file, offset, length);      \
    }
ALLOCATES(posix_fallocate)
ALLOCATES(posix_fallocate64)

int flock(int file, int operation) {
    int kind = is_due_at(LOCK, file);
    FAIL(kind)
    return ((int (*)(int, int))real("flock"))(file, operation);
}

int rename(const char *from, const char *to) {
    int kind = is_due(RENAME, to);
    FAIL(kind)
    return ((int (*)(const char *, const char *))real("rename"))(from, to);
}

int mkdir(const char *path, mode_t mode) {
    int kind = is_due(MKDIR, path);
    FAIL(kind)
    return ((int (*)(const char *, mode_t))real("mkdir"))(path, mode);
}

#define MAPS(name)                                                                                     \
    void *name(void *at, size_t n, int protection, int flags, int file, off_t offset) {                \
        int kind = file >= 0 ? is_due_at(MAP, file) : n >= LARGE ? is_due(LARGE_MEMORY, NULL) : 0;      \
        if (kind > 0) return errno = kind, MAP_FAILED;                                                 \
        return (void *)syscall(SYS_mmap, at, n, protection, flags, file, offset);                      \
    }
MAPS(mmap)
MAPS(mmap64)

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with) {
    int kind = is_due(THREAD, NULL);
    if (kind > 0) return kind;
    return ((int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))real("pthread_create"))(
        thread, how, run, with);
}
