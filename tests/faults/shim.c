/* Fault injection for LD_PRELOAD: counts the changes that a process makes in a folder. At a given
 * change the process is killed, or all writes fail from then on.
 *
 *   FAULT_ROOT   folder whose changes are counted
 *   FAULT_ONLY   text that the command line of a process must contain for its changes to be counted
 *   FAULT_MODE   count | kill | fail
 *   FAULT_AT     number of the change, from 1; `fail` counts only changes that take disk space
 *   FAULT_ERROR  errno of failing writes, such as ENOSPC
 *   FAULT_LOG    file for one line per change: its kind and path
 *
 * The process is killed before the change if its number is odd, and after it if even.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *root, *log_path;
static long at, count;
static int mode, fails, error; /* mode: 0 off, 1 count, 2 kill, 3 fail */

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t raw_write(int fd, const void *data, size_t size) {
    REAL(write);
    return real(fd, data, size);
}

__attribute__((constructor)) static void begin(void) {
    const char *wanted = getenv("FAULT_ONLY"), *kind = getenv("FAULT_MODE");
    char line[4096] = {0};
    root = getenv("FAULT_ROOT");
    log_path = getenv("FAULT_LOG");
    if (!root || !kind || !wanted) return; /* mode stays 0 */
    int fd = open("/proc/self/cmdline", O_RDONLY);
    if (fd < 0) return;
    ssize_t size = read(fd, line, sizeof line - 1);
    close(fd);
    for (ssize_t i = 0; i < size; i++)
        if (!line[i]) line[i] = ' ';
    if (!strstr(line, wanted)) return;
    at = getenv("FAULT_AT") ? atol(getenv("FAULT_AT")) : 0;
    mode = !strcmp(kind, "kill") ? 2 : !strcmp(kind, "fail") ? 3 : 1;
    error = getenv("FAULT_ERROR") ? atoi(getenv("FAULT_ERROR")) : ENOSPC;
}

static void note(const char *kind, const char *path) {
    if (!log_path) return;
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%s %s\n", kind, path);
    int fd = open(log_path, O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (fd < 0) return;
    if (raw_write(fd, line, (size_t)size) < 0) abort();
    close(fd);
}

/* Return whether the change is counted; kill the process here if it is change `at` and odd. */
static int counts(const char *kind, const char *path, int takes_space) {
    size_t length = mode ? strlen(root) : 0;
    if (!mode || !path || strncmp(path, root, length) || path[length] != '/') return 0;
    if (mode == 3 && !takes_space) return 0;
    long number = __sync_add_and_fetch(&count, 1);
    if (mode == 1) note(kind, path);
    if (mode == 2 && number == at && at % 2) kill(getpid(), SIGKILL);
    if (mode == 3 && number >= at) fails = 1;
    return 1;
}

static void after(int counted) {
    if (counted && mode == 2 && count >= at && at % 2 == 0) kill(getpid(), SIGKILL);
}

static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, buffer, PATH_MAX - 1);
    if (size < 0) return NULL;
    buffer[size] = 0;
    return buffer;
}

static const char *absolute(int folder, const char *path, char *buffer) {
    char start[PATH_MAX];
    if (path[0] == '/') return path;
    if (folder == AT_FDCWD) {
        if (!getcwd(start, sizeof start)) return NULL;
    } else if (!path_of(folder, start)) {
        return NULL;
    }
    if (snprintf(buffer, PATH_MAX, "%s/%s", start, path) >= PATH_MAX) return NULL;
    return buffer;
}

#define MAY_FAIL(value) \
    if (counted && fails) { \
        errno = error; \
        return value; \
    }

#define ON_FD(kind, space) \
    char buffer[PATH_MAX]; \
    int counted = mode ? counts(kind, path_of(fd, buffer), space) : 0

#define ON_PATH(kind, folder, path, space) \
    char buffer[PATH_MAX]; \
    int counted = mode ? counts(kind, absolute(folder, path, buffer), space) : 0

ssize_t write(int fd, const void *data, size_t size) {
    ON_FD("write", 1);
    MAY_FAIL(-1)
    ssize_t done = raw_write(fd, data, size);
    after(counted);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(writev);
    ON_FD("write", 1);
    MAY_FAIL(-1)
    ssize_t done = real(fd, parts, number);
    after(counted);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    ON_FD("write", 1);
    MAY_FAIL(-1)
    ssize_t done = real(fd, data, size, offset);
    after(counted);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    return pwrite64(fd, data, size, offset);
}

ssize_t sendfile64(int fd, int from, off64_t *offset, size_t size) {
    REAL(sendfile64);
    ON_FD("write", 1);
    MAY_FAIL(-1)
    ssize_t done = real(fd, from, offset, size);
    after(counted);
    return done;
}

ssize_t sendfile(int fd, int from, off_t *offset, size_t size) {
    return sendfile64(fd, from, offset, size);
}

int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    ON_FD("truncate", 1);
    MAY_FAIL(-1)
    int done = real(fd, size);
    after(counted);
    return done;
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int fallocate64(int fd, int how, off64_t offset, off64_t size) {
    REAL(fallocate64);
    ON_FD("allocate", 1);
    MAY_FAIL(-1)
    int done = real(fd, how, offset, size);
    after(counted);
    return done;
}

int fallocate(int fd, int how, off_t offset, off_t size) {
    return fallocate64(fd, how, offset, size);
}

int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    REAL(posix_fallocate64);
    ON_FD("allocate", 1);
    if (counted && fails) return error;
    int done = real(fd, offset, size);
    after(counted);
    return done;
}

int posix_fallocate(int fd, off_t offset, off_t size) {
    return posix_fallocate64(fd, offset, size);
}

int fsync(int fd) {
    REAL(fsync);
    ON_FD("fsync", 0);
    int done = real(fd);
    after(counted);
    return done;
}

int rename(const char *from, const char *to) {
    REAL(rename);
    ON_PATH("rename", AT_FDCWD, to, 0);
    int done = real(from, to);
    after(counted);
    return done;
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    ON_PATH("rename", to_folder, to, 0);
    int done = real(from_folder, from, to_folder, to);
    after(counted);
    return done;
}

int unlink(const char *path) {
    REAL(unlink);
    ON_PATH("remove", AT_FDCWD, path, 0);
    int done = real(path);
    after(counted);
    return done;
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    ON_PATH("remove", folder, path, 0);
    int done = real(folder, path, flags);
    after(counted);
    return done;
}

int rmdir(const char *path) {
    REAL(rmdir);
    ON_PATH("remove", AT_FDCWD, path, 0);
    int done = real(path);
    after(counted);
    return done;
}

int mkdir(const char *path, mode_t permissions) {
    REAL(mkdir);
    ON_PATH("create", AT_FDCWD, path, 1);
    MAY_FAIL(-1)
    int done = real(path, permissions);
    after(counted);
    return done;
}

static int opened(int folder, const char *path, int flags, mode_t permissions) {
    static int (*real)(int, const char *, int, ...);
    if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, "openat64");
    int counted = 0;
    char buffer[PATH_MAX];
    if (mode && (flags & (O_CREAT | O_TRUNC)))
        counted = counts("create", absolute(folder, path, buffer), 1);
    MAY_FAIL(-1)
    int done = real(folder, path, flags, permissions);
    after(counted);
    return done;
}

#define PERMISSIONS \
    mode_t permissions = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        permissions = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...) {
    PERMISSIONS
    return opened(AT_FDCWD, path, flags, permissions);
}

int open64(const char *path, int flags, ...) {
    PERMISSIONS
    return opened(AT_FDCWD, path, flags, permissions);
}

int openat(int folder, const char *path, int flags, ...) {
    PERMISSIONS
    return opened(folder, path, flags, permissions);
}

int openat64(int folder, const char *path, int flags, ...) {
    PERMISSIONS
    return opened(folder, path, flags, permissions);
}
