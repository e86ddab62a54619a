/* Fails, shortens or kills at the k-th call that changes a file below a folder. Loaded by LD_PRELOAD.
 *
 * faults_arm(root, at, mode) begins to count; faults_count() gives the calls so far. Every counted call is also written
 * to the file of faults_log(path), with the data of writes, so that a power cut can be replayed.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, TORN, SHORT, FAIL_ONCE, FAIL_FROM };

static char root[PATH_MAX];
static size_t root_length;
static long at, count, hits;
static char kinds[1 << 16];
static int mode, error_number, log_fd = -1;

void faults_arm(const char *folder, long position, int what, int error)
{
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    at = position;
    mode = what;
    error_number = error;
    count = hits = 0;
    memset(kinds, 0, sizeof kinds);
}

long faults_hits(void) { return hits; }

/* One letter for each call so far: W for a write, and a dot for the others. */
const char *faults_kinds(void) { return kinds; }

void faults_log(const char *path)
{
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
}

static int inside(const char *path)
{
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int path_of_fd(int fd, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[length > 0 ? length : 0] = 0;
    return length > 0;
}

static int path_of(int folder, const char *name, char *out)
{
    if (name[0] == '/')
        return snprintf(out, PATH_MAX, "%s", name) > 0;
    char base[PATH_MAX];
    if (folder == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of_fd(folder, base))
        return 0;
    return snprintf(out, PATH_MAX, "%.*s/%s", PATH_MAX - 300, base, name) > 0;
}

static void record(char kind, const char *first, const char *second, const void *data, size_t length)
{
    if (log_fd < 0)
        return;
    uint32_t sizes[3] = {(uint32_t)strlen(first), (uint32_t)(second ? strlen(second) : 0), (uint32_t)length};
    struct iovec parts[] = {{&kind, 1}, {sizes, sizeof sizes}, {(void *)first, sizes[0]}, {(void *)second, sizes[1]},
                            {(void *)data, length}};
    syscall(SYS_writev, log_fd, parts, 5);
}

static void die(void)
{
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
}

static void counted(char kind)
{
    if (count < (long)sizeof kinds - 1)
        kinds[count] = kind;
    count++;
}

/* Count a call; 1 if it has to fail, with errno set. */
static int faulty(char kind)
{
    counted(kind);
    if (mode == KILL && count == at)
        die();
    if ((mode == FAIL_ONCE && count == at) || (mode == FAIL_FROM && count >= at)) {
        errno = error_number;
        hits++;
        return 1;
    }
    return 0;
}

/* Fail where there is no room: what frees room, or writes nothing, works on a full disk. */
static int faulty_unless_full(void)
{
    if (mode == FAIL_FROM && error_number == ENOSPC) {
        counted('.');
        return 0;
    }
    return faulty('.');
}

static int open_common(int folder, const char *name, int flags, mode_t permissions)
{
    char path[PATH_MAX];
    int writes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);
    if (writes && !(flags & O_PATH) && root_length && path_of(folder, name, path) && inside(path)) {
        if (faulty('.'))
            return -1;
        int fd = (int)syscall(SYS_openat, folder, name, flags, permissions);
        if (fd >= 0)
            record(flags & O_TRUNC ? 'T' : 'O', path, NULL, NULL, 0);
        return fd;
    }
    return (int)syscall(SYS_openat, folder, name, flags, permissions);
}

#define PERMISSIONS                                                                                                    \
    mode_t permissions = 0;                                                                                            \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        permissions = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
    }

int open(const char *name, int flags, ...) { PERMISSIONS return open_common(AT_FDCWD, name, flags, permissions); }
int open64(const char *name, int flags, ...) { PERMISSIONS return open_common(AT_FDCWD, name, flags, permissions); }
int openat(int folder, const char *name, int flags, ...) { PERMISSIONS return open_common(folder, name, flags, permissions); }
int openat64(int folder, const char *name, int flags, ...) { PERMISSIONS return open_common(folder, name, flags, permissions); }
int creat(const char *name, mode_t permissions) { return open_common(AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC, permissions); }

static int is_inside_fd(int fd, char *path) { return root_length && fd != log_fd && path_of_fd(fd, path) && inside(path); }

ssize_t write(int fd, const void *data, size_t length)
{
    char path[PATH_MAX];
    if (!is_inside_fd(fd, path))
        return syscall(SYS_write, fd, data, length);
    if (faulty('W'))
        return -1;
    if (count == at && (mode == TORN || mode == SHORT) && length > 1) {
        length /= 2;
        hits++;
    }
    ssize_t done = syscall(SYS_write, fd, data, length);
    if (done > 0)
        record('W', path, NULL, data, (size_t)done);
    if (count == at && mode == TORN)
        die();
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int number)
{
    char path[PATH_MAX];
    if (!is_inside_fd(fd, path))
        return syscall(SYS_writev, fd, parts, number);
    ssize_t total = 0;
    for (int index = 0; index < number; index++) {
        ssize_t done = write(fd, parts[index].iov_base, parts[index].iov_len);
        if (done < 0)
            return total ? total : -1;
        total += done;
        if ((size_t)done < parts[index].iov_len)
            break;
    }
    return total;
}

#define COUNTED_FD(name, number, kind)                                                                          \
    int name(int fd)                                                                                                   \
    {                                                                                                                  \
        char path[PATH_MAX];                                                                                           \
        if (is_inside_fd(fd, path)) {                                                                                  \
            if (faulty('.'))                                                                                           \
                return -1;                                                                                             \
            record(kind, path, NULL, NULL, 0);                                                                         \
        }                                                                                                              \
        return (int)syscall(number, fd);                                                                               \
    }
COUNTED_FD(fsync, SYS_fsync, 'S')
COUNTED_FD(fdatasync, SYS_fdatasync, 'S')

int close(int fd)
{
    char path[PATH_MAX];
    int flags = root_length ? (int)syscall(SYS_fcntl, fd, F_GETFL) : 0;
    if (flags > 0 && (flags & O_ACCMODE) != O_RDONLY && is_inside_fd(fd, path) && faulty_unless_full()) {
        int error = errno;
        syscall(SYS_close, fd);
        errno = error;
        return -1;
    }
    return (int)syscall(SYS_close, fd);
}

static int rename_common(int from, const char *name, int to, const char *other, unsigned flags)
{
    char first[PATH_MAX], second[PATH_MAX];
    int counts = root_length && path_of(from, name, first) && path_of(to, other, second) && (inside(first) || inside(second));
    if (counts && faulty_unless_full())
        return -1;
    int result = (int)syscall(SYS_renameat2, from, name, to, other, flags);
    if (counts && !result)
        record(flags ? 'X' : 'R', first, second, NULL, 0);
    return result;
}

int rename(const char *name, const char *other) { return rename_common(AT_FDCWD, name, AT_FDCWD, other, 0); }
int renameat(int from, const char *name, int to, const char *other) { return rename_common(from, name, to, other, 0); }
int renameat2(int from, const char *name, int to, const char *other, unsigned flags) { return rename_common(from, name, to, other, flags); }

static int unlink_common(int folder, const char *name, int flags)
{
    char path[PATH_MAX];
    int counts = root_length && path_of(folder, name, path) && inside(path);
    if (counts && faulty_unless_full())
        return -1;
    int result = (int)syscall(SYS_unlinkat, folder, name, flags);
    if (counts && !result)
        record('U', path, NULL, NULL, 0);
    return result;
}

int unlink(const char *name) { return unlink_common(AT_FDCWD, name, 0); }
int unlinkat(int folder, const char *name, int flags) { return unlink_common(folder, name, flags); }
int rmdir(const char *name) { return unlink_common(AT_FDCWD, name, AT_REMOVEDIR); }

static int mkdir_common(int folder, const char *name, mode_t permissions)
{
    char path[PATH_MAX];
    int counts = root_length && path_of(folder, name, path) && inside(path);
    if (counts && faulty('.'))
        return -1;
    int result = (int)syscall(SYS_mkdirat, folder, name, permissions);
    if (counts && !result)
        record('M', path, NULL, NULL, 0);
    return result;
}

int mkdir(const char *name, mode_t permissions) { return mkdir_common(AT_FDCWD, name, permissions); }
int mkdirat(int folder, const char *name, mode_t permissions) { return mkdir_common(folder, name, permissions); }
