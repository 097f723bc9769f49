// Makes one call of the C library go wrong below a folder. Built and preloaded by tests/faults.py.
// What counts as a call is a write, sync, rename or read of a file there, in any thread.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL, FULL, KILL, DELAY };  // what goes wrong, as tests/faults.py numbers it
enum { OTHER, WRITE };
static char below[PATH_MAX];
static int target, action;
static atomic_int counted;

// From now on the number-th call below `folder` goes wrong. With 0, calls are only counted.
void arm(const char *folder, int number, int what) {
  snprintf(below, sizeof below, "%s/", folder);
  target = number, action = what, counted = 0;
}

int calls(void) { return counted; }

static int inside(const char *path) { return below[0] && !strncmp(path, below, strlen(below)); }

static int inside_fd(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = below[0] ? readlink(link, path, sizeof path - 1) : -1;
  path[n < 0 ? 0 : n] = 0;
  return n > 0 && inside(path);
}

// Whether this call goes wrong. Errno then says how.
static int wrong(int kind) {
  int number = ++counted;
  errno = action == FULL ? ENOSPC : EIO;
  if (action == FULL) return target && kind == WRITE && number >= target;  // and stays full
  if (number != target) return 0;
  if (action == DELAY) usleep(300000);
  if (action == KILL && kind != WRITE) raise(SIGKILL);
  return action != DELAY;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(name, kind, is_inside, ...)               \
  {                                                    \
    if ((is_inside) && wrong(kind)) return -1;         \
    return NEXT(name)(__VA_ARGS__);                    \
  }
// Half of a write reaches the file before it fails, or before the process is killed.
#define PUT(name, half, ...)                           \
  {                                                    \
    if (inside_fd(fd) && wrong(WRITE)) {               \
      int why = errno;                                 \
      if (counted == target || action != FULL) (void)!(half); \
      if (action == KILL) raise(SIGKILL);              \
      errno = why;                                     \
      return -1;                                       \
    }                                                  \
    return NEXT(name)(__VA_ARGS__);                    \
  }

ssize_t write(int fd, const void *data, size_t n)
    PUT(write, NEXT(write)(fd, data, n / 2), fd, data, n)
ssize_t pwrite(int fd, const void *data, size_t n, off_t at)
    PUT(pwrite, NEXT(pwrite)(fd, data, n / 2, at), fd, data, n, at)
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at)
    PUT(pwrite64, NEXT(pwrite64)(fd, data, n / 2, at), fd, data, n, at)
ssize_t writev(int fd, const struct iovec *parts, int n)
    PUT(writev, NEXT(writev)(fd, parts, n / 2), fd, parts, n)
int fsync(int fd) CALL(fsync, OTHER, inside_fd(fd), fd)
int fdatasync(int fd) CALL(fdatasync, OTHER, inside_fd(fd), fd)
int rename(const char *from, const char *to) CALL(rename, OTHER, inside(to), from, to)
int renameat(int a, const char *from, int b, const char *to)
    CALL(renameat, OTHER, inside(to), a, from, b, to)
ssize_t read(int fd, void *data, size_t n) CALL(read, OTHER, inside_fd(fd), fd, data, n)
ssize_t pread(int fd, void *data, size_t n, off_t at)
    CALL(pread, OTHER, inside_fd(fd), fd, data, n, at)
ssize_t pread64(int fd, void *data, size_t n, off64_t at)
    CALL(pread64, OTHER, inside_fd(fd), fd, data, n, at)
