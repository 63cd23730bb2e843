/* Makes chosen system calls fail in the processes of psie's engine, and counts them: loaded by LD_PRELOAD.
 *
 * Only tests know it (faults.py builds it, loads it and writes its orders); psie itself has no place where a fault could be
 * ordered. The orders and counts lie in a file that every process shares, so that they can change while a zygote lives.
 * A wrapper of the C library goes by the number of the system call that it ends in: openat(2) also for open(3), and so on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#define CALLS 1024

struct orders { /* as in faults.py */
    atomic_int call;   /* which system call fails; -1: none */
    atomic_int error;  /* with this errno */
    atomic_int skip;   /* after so many calls that succeed */
    atomic_int hits;   /* how often one has failed */
    atomic_int hitter; /* the process whose call it was */
    atomic_int ran;    /* how often a plugin has run: it says so itself */
    atomic_int counts[CALLS];
};

static struct orders *orders;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("FAULTY_ORDERS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *place = mmap(NULL, sizeof *orders, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (place != MAP_FAILED)
        orders = place;
}

/* Called by the tests' plugin. */
void faulty_plugin_runs(void)
{
    if (orders)
        atomic_fetch_add(&orders->ran, 1);
}

static int fails(long call)
{
    if (!orders || call < 0 || call >= CALLS)
        return 0;
    atomic_fetch_add(&orders->counts[call], 1);
    if (atomic_load(&orders->call) != call || atomic_fetch_sub(&orders->skip, 1) != 0)
        return 0;
    atomic_fetch_add(&orders->hits, 1);
    atomic_store(&orders->hitter, (int)syscall(SYS_getpid));
    errno = atomic_load(&orders->error);
    return 1;
}

#define NEXT(type, name, ...)                             \
    static type (*next)(__VA_ARGS__);                     \
    if (!next)                                            \
    next = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define WRAP(type, name, call, parameters, arguments)     \
    type name parameters                                  \
    {                                                     \
        static type(*next) parameters;                    \
        if (!next)                                        \
            next = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        return fails(call) ? -1 : next arguments;         \
    }

long syscall(long call, ...)
{
    NEXT(long, syscall, long, ...);
    va_list list;
    long a[6];
    va_start(list, call);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    return fails(call) ? -1 : next(call, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int prctl(int option, ...)
{
    NEXT(int, prctl, int, ...);
    va_list list;
    unsigned long a[4];
    va_start(list, option);
    for (int i = 0; i < 4; i++)
        a[i] = va_arg(list, unsigned long);
    va_end(list);
    return fails(SYS_prctl) ? -1 : next(option, a[0], a[1], a[2], a[3]);
}

#define OPEN(name, parameters, arguments)                 \
    int name parameters                                   \
    {                                                     \
        static int(*next) parameters;                     \
        if (!next)                                        \
            next = (int(*) parameters)dlsym(RTLD_NEXT, #name); \
        va_list list;                                     \
        va_start(list, flags);                            \
        mode_t mode = va_arg(list, unsigned);             \
        va_end(list);                                     \
        return fails(SYS_openat) ? -1 : next arguments;   \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

#define FCNTL(name)                                       \
    int name(int fd, int command, ...)                    \
    {                                                     \
        static int (*next)(int, int, ...);                \
        if (!next)                                        \
            next = (int (*)(int, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list list;                                     \
        va_start(list, command);                          \
        unsigned long argument = va_arg(list, unsigned long); \
        va_end(list);                                     \
        return fails(SYS_fcntl) ? -1 : next(fd, command, argument); \
    }

FCNTL(fcntl)
FCNTL(fcntl64)

/* What takes something from the kernel: to change or to end that never fails. */
int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    NEXT(int, epoll_ctl, int, int, int, struct epoll_event *);
    return operation == EPOLL_CTL_ADD && fails(SYS_epoll_ctl) ? -1 : next(epoll, operation, fd, event);
}

WRAP(int, mount, SYS_mount, (const char *a, const char *b, const char *c, unsigned long d, const void *e), (a, b, c, d, e))
WRAP(int, umount2, SYS_umount2, (const char *a, int b), (a, b))
WRAP(int, unshare, SYS_unshare, (int a), (a))
WRAP(int, setns, SYS_setns, (int a, int b), (a, b))
WRAP(int, sethostname, SYS_sethostname, (const char *a, size_t b), (a, b))
WRAP(int, setresuid, SYS_setresuid, (uid_t a, uid_t b, uid_t c), (a, b, c))
WRAP(int, setresgid, SYS_setresgid, (gid_t a, gid_t b, gid_t c), (a, b, c))
WRAP(int, setgroups, SYS_setgroups, (size_t a, const gid_t *b), (a, b))
WRAP(int, capset, SYS_capset, (void *a, const void *b), (a, b))
WRAP(int, setrlimit, SYS_prlimit64, (__rlimit_resource_t a, const struct rlimit *b), (a, b))
WRAP(int, setrlimit64, SYS_prlimit64, (__rlimit_resource_t a, const struct rlimit64 *b), (a, b))
WRAP(int, socket, SYS_socket, (int a, int b, int c), (a, b, c))
WRAP(int, socketpair, SYS_socketpair, (int a, int b, int c, int d[2]), (a, b, c, d))
WRAP(int, setsockopt, SYS_setsockopt, (int a, int b, int c, const void *d, socklen_t e), (a, b, c, d, e))
WRAP(ssize_t, send, SYS_sendto, (int a, const void *b, size_t c, int d), (a, b, c, d))
WRAP(ssize_t, sendmsg, SYS_sendmsg, (int a, const struct msghdr *b, int c), (a, b, c))
WRAP(ssize_t, recvmsg, SYS_recvmsg, (int a, struct msghdr *b, int c), (a, b, c))
WRAP(int, mkdir, SYS_mkdirat, (const char *a, mode_t b), (a, b))
WRAP(int, mkdirat, SYS_mkdirat, (int a, const char *b, mode_t c), (a, b, c))
WRAP(int, chmod, SYS_fchmodat, (const char *a, mode_t b), (a, b))
WRAP(int, fchmodat, SYS_fchmodat, (int a, const char *b, mode_t c, int d), (a, b, c, d))
WRAP(int, chown, SYS_fchownat, (const char *a, uid_t b, gid_t c), (a, b, c))
WRAP(int, chdir, SYS_chdir, (const char *a), (a))
WRAP(ssize_t, write, SYS_write, (int a, const void *b, size_t c), (a, b, c))
WRAP(int, dup, SYS_dup, (int a), (a))
WRAP(int, dup2, SYS_dup3, (int a, int b), (a, b))
WRAP(int, dup3, SYS_dup3, (int a, int b, int c), (a, b, c))
WRAP(int, pipe2, SYS_pipe2, (int a[2], int b), (a, b))
WRAP(int, memfd_create, SYS_memfd_create, (const char *a, unsigned b), (a, b))
WRAP(pid_t, fork, SYS_clone, (void), ())
WRAP(pid_t, setsid, SYS_setsid, (void), ())
