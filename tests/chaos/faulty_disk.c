/* write() as a disk that fails now and then, for LD_PRELOAD. Only files below $CHAOS_ROOT, only as told:

   $CHAOS_DISK/full   while it exists, nothing fits: half of what was asked for is written, then ENOSPC
   $CHAOS_DISK/lose   one write to a token log is acknowledged and gone: zeros where it should be
   $CHAOS_DISK/tear   one write gets half way, and the process is dead

   "lose" and "tear" are taken by whoever removes the file. Each is noted in $CHAOS_DISK/taken. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef ssize_t (*write_t)(int, const void *, size_t);

static write_t real_write(void) {
    static write_t found;
    if (!found) found = (write_t)dlsym(RTLD_NEXT, "write");
    return found;
}

static int is_below(const char *path, const char *root) {
    size_t length = strlen(root);
    return strncmp(path, root, length) == 0 && path[length] == '/';
}

static int takes(const char *disk, const char *fault, const char *path) {
    char name[4096], line[8192];
    snprintf(name, sizeof name, "%s/%s", disk, fault);
    if (unlink(name) != 0) return 0;
    snprintf(name, sizeof name, "%s/taken", disk);
    int taken = open(name, O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (taken >= 0) {
        int length = snprintf(line, sizeof line, "%s %s\n", fault, path);
        if (real_write()(taken, line, length) < 0) abort();
        close(taken);
    }
    return 1;
}

static int is_full(const char *disk) {
    char name[4096];
    snprintf(name, sizeof name, "%s/full", disk);
    return access(name, F_OK) == 0;
}

ssize_t write(int fd, const void *data, size_t size) {
    const char *disk = getenv("CHAOS_DISK"), *root = getenv("CHAOS_ROOT");
    char link[64], path[4096];
    struct stat what;
    if (!disk || !root || size < 2 || fstat(fd, &what) != 0 || !S_ISREG(what.st_mode))
        return real_write()(fd, data, size);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int before = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    errno = before;
    if (!is_below(path, root)) return real_write()(fd, data, size);
    if (is_full(disk)) {
        static __thread int has_filled;
        if ((has_filled = !has_filled)) return real_write()(fd, data, size / 2);
        errno = ENOSPC;
        return -1;
    }
    if (strstr(path, "/token_log/") && takes(disk, "lose", path)) {
        if (ftruncate(fd, what.st_size + (off_t)size) != 0) abort();
        return (ssize_t)size;
    }
    if (takes(disk, "tear", path)) {
        if (real_write()(fd, data, size / 2) < 0) abort();
        kill(getpid(), SIGKILL);
    }
    errno = before;
    return real_write()(fd, data, size);
}
