/*
 * The floor under a sandbox: the namespaces that one has, about the mounts that it has, and its end again. No Python, no
 * cgroup, no filter, no call.
 *
 *     floor WORKERS SECONDS MEMORY INIT WORKER FOLDER...
 *
 * binds each FOLDER read-only; prints how many, and the seconds that they took. The process that each is cloned from has MEMORY
 * pages of its own; what is cloned writes to INIT of them, and where WORKER is not 0 it has a fork that writes to so many: what
 * copying on write alone costs a sandbox whose processes are forks of one another.
 *
 * Sources: clone(2), user_namespaces(7), mount_namespaces(7), mount_setattr(2), pivot_root(2).
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NAMESPACES (CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_NEWNET)
#define ROOT "/sys" /* where the new root is put together: a folder that every host has */

static long page, pages, of_init, of_worker;
static char *memory;

/* So many of the pages, all over the memory. */
static void touch(long count)
{
	for (long i = 0; i < count; i++)
		memory[i * pages / count * page]++;
}

static void attach(const char *source, const char *target, const char *type, unsigned long flags, const char *options)
{
	if (mount(source, target, type, flags, options) < 0)
		err(1, "mount %s", target);
}

/* A folder below the new root, with those on the way to it. */
static const char *folder(const char *path)
{
	static char target[4096];
	snprintf(target, sizeof target, ROOT "%s", path);
	for (char *slash = target + sizeof ROOT; (slash = strchr(slash, '/')) != NULL; slash++) {
		*slash = 0;
		mkdir(target, 0755);
		*slash = '/';
	}
	mkdir(target, 0755);
	return target;
}

static void sandbox(char **folders)
{
	static const char *const devices[] = {"/dev/null", "/dev/zero", "/dev/urandom", NULL};
	struct mount_attr read_only = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV};

	if (setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)
		err(1, "change of ids");
	sethostname("floor", 5);
	attach(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
	attach("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m");
	for (; *folders != NULL; folders++) {
		const char *target = folder(*folders);
		attach(*folders, target, NULL, MS_BIND | MS_REC, NULL);
		if (syscall(SYS_mount_setattr, AT_FDCWD, target, AT_RECURSIVE, &read_only, sizeof read_only) < 0)
			err(1, "mount_setattr %s", target);
	}
	folder("/dev");
	for (const char *const *device = devices; *device != NULL; device++) {
		char target[64];
		snprintf(target, sizeof target, ROOT "%s", *device);
		close(open(target, O_CREAT | O_WRONLY | O_CLOEXEC, 0644));
		attach(*device, target, NULL, MS_BIND, NULL);
	}
	attach("tmpfs", folder("/tmp"), "tmpfs", MS_NOSUID | MS_NODEV, "size=100m");
	attach("tmpfs", folder("/workspace"), "tmpfs", MS_NOSUID | MS_NODEV, "size=100m");
	/* A host that masks parts of its own /proc refuses a fresh one: then a sandbox has none either. */
	if (mount("proc", folder("/proc"), "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0 && errno != EPERM)
		err(1, "mount /proc");
	if (chdir(ROOT) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/workspace") < 0)
		err(1, "pivot_root");
}

static void write_to(const char *format, pid_t pid, const char *text)
{
	char path[64];
	snprintf(path, sizeof path, format, pid);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		err(1, "%s", path);
	close(fd);
}

static void one(char **folders)
{
	char text[64], byte = 0;
	int mapped[2], status;

	if (pipe2(mapped, O_CLOEXEC) < 0)
		err(1, "pipe2");
	pid_t pid = (pid_t)syscall(SYS_clone, NAMESPACES | SIGCHLD, 0, 0, 0, 0);
	if (pid < 0)
		err(1, "clone");
	if (pid == 0) {
		if (read(mapped[0], &byte, 1) != 1)
			_exit(1);
		touch(of_init);
		sandbox(folders);
		if (of_worker > 0) {
			pid = fork();
			if (pid < 0)
				err(1, "fork");
			if (pid == 0) {
				touch(of_worker);
				_exit(0);
			}
			waitpid(pid, &status, 0);
		}
		_exit(0);
	}
	write_to("/proc/%d/setgroups", pid, "deny");
	snprintf(text, sizeof text, "0 %u 1", getuid());
	write_to("/proc/%d/uid_map", pid, text);
	snprintf(text, sizeof text, "0 %u 1", getgid());
	write_to("/proc/%d/gid_map", pid, text);
	if (write(mapped[1], &byte, 1) != 1)
		err(1, "write");
	close(mapped[0]);
	close(mapped[1]);
	if (waitpid(pid, &status, 0) < 0 || status != 0)
		errx(1, "a sandbox ended with status %d", status);
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	if (argc < 6)
		errx(2, "usage: floor WORKERS SECONDS MEMORY INIT WORKER FOLDER...");
	page = sysconf(_SC_PAGESIZE), pages = atol(argv[3]), of_init = atol(argv[4]), of_worker = atol(argv[5]);
	int workers = atoi(argv[1]), counts[2], failed = 0;
	double start = now(), end = start + atof(argv[2]);
	long total = 0, count;

	if (pipe(counts) < 0)
		err(1, "pipe");
	for (int worker = 0; worker < workers; worker++) {
		pid_t pid = fork();
		if (pid < 0)
			err(1, "fork");
		if (pid == 0) {
			if (pages > 0) {
				memory = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
				if (memory == MAP_FAILED || madvise(memory, pages * page, MADV_NOHUGEPAGE) < 0)
					err(1, "memory");
				touch(pages);
			}
			for (count = 0; count == 0 || now() < end; count++)
				one(argv + 6);
			if (write(counts[1], &count, sizeof count) != sizeof count)
				err(1, "write");
			_exit(0);
		}
	}
	for (int status; wait(&status) > 0;)
		failed |= status;
	double seconds = now() - start;
	close(counts[1]);
	while (read(counts[0], &count, sizeof count) == sizeof count)
		total += count;
	printf("%ld %.6f\n", total, seconds);
	return failed != 0;
}
