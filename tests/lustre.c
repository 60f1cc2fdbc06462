/*
 * Makes a mounted slowfs (tests/slowfs) look like Lustre to the process that this is preloaded into (LD_PRELOAD), so that
 * the product needs no hooks for tests: it makes the calls that it makes on a real Lustre.
 *
 * FUSE carries an ioctl's argument only as a pointer to as many bytes as its number says. Lustre's numbers say something
 * else: the FID's has 8 for the 16 that it writes, a group lock's argument is the group itself, the striping's is of any
 * size. These are translated to numbers of our own. And statfs of a slowfs says "Lustre", and so do the lists of mounts.
 * /proc/fs/lustre is a folder of the test's.
 *
 * fsync becomes an ioctl, too: with FUSE it has the file for itself, and would wait for a write that hangs and be waited for
 * by all others. What stays different from Lustre: ftruncate does so.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FUSE_MAGIC 0x65735546
#define LUSTRE_MAGIC 0x0BD00BD0
#define FSID 0x6c6c6f6f70000001ULL
/* What slowfs answers as the longest name (tests/slowfs/main.rs has the same number). */
#define SLOWFS_NAME_MAX 249

#define LUSTRE_FID 0x800866adUL
#define LUSTRE_GROUP_LOCK 0x4008669eUL
#define LUSTRE_GROUP_UNLOCK 0x4008669fUL
#define LUSTRE_SETSTRIPE 0x4008669aUL
#define LOV_V3 0x0BD30BD0

struct group {
	uint64_t gid;
	uint32_t nonblock;
	uint32_t unused;
};

struct stripe {
	char lov[48];
};

/* tests/slowfs/ioctl.rs has the same. */
#define SLOWFS_FID _IOR('l', 0x61, char[16])
#define SLOWFS_GROUP_LOCK _IOW('l', 0x62, struct group)
#define SLOWFS_GROUP_UNLOCK _IOW('l', 0x63, struct group)
#define SLOWFS_SETSTRIPE _IOW('l', 0x64, struct stripe)
#define SLOWFS_SYNC _IO('l', 0x65)

static int
is_slowfs(int fd)
{
	int saved = errno;
	struct statfs stat;
	int yes = syscall(SYS_fstatfs, fd, &stat) == 0 && stat.f_type == FUSE_MAGIC && stat.f_namelen == SLOWFS_NAME_MAX;

	errno = saved;
	return yes;
}

static int
group_call(int fd, unsigned long request, uintptr_t gid)
{
	struct group group = { .gid = gid, .nonblock = (fcntl(fd, F_GETFL) & O_NONBLOCK) != 0 };

	return syscall(SYS_ioctl, fd, request, &group);
}

static int
set_stripe(int fd, const void *lov)
{
	struct stripe stripe = { { 0 } };
	uint32_t magic;

	memcpy(&magic, lov, sizeof(magic));
	memcpy(stripe.lov, lov, magic == LOV_V3 ? 48 : 32);
	return syscall(SYS_ioctl, fd, SLOWFS_SETSTRIPE, &stripe);
}

int
ioctl(int fd, unsigned long request, ...)
{
	va_list args;
	void *arg;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	switch (request & 0xffffffffUL) {
	case LUSTRE_FID:
		if (is_slowfs(fd)) {
			return syscall(SYS_ioctl, fd, SLOWFS_FID, arg);
		}
		break;
	case LUSTRE_GROUP_LOCK:
		if (is_slowfs(fd)) {
			return group_call(fd, SLOWFS_GROUP_LOCK, (uintptr_t)arg);
		}
		break;
	case LUSTRE_GROUP_UNLOCK:
		if (is_slowfs(fd)) {
			return group_call(fd, SLOWFS_GROUP_UNLOCK, (uintptr_t)arg);
		}
		break;
	case LUSTRE_SETSTRIPE:
		if (is_slowfs(fd)) {
			return set_stripe(fd, arg);
		}
		break;
	}
	return syscall(SYS_ioctl, fd, request, arg);
}

int
fdatasync(int fd)
{
	return is_slowfs(fd) ? syscall(SYS_ioctl, fd, SLOWFS_SYNC, 0) : syscall(SYS_fdatasync, fd);
}

int
fsync(int fd)
{
	return is_slowfs(fd) ? syscall(SYS_ioctl, fd, SLOWFS_SYNC, 0) : syscall(SYS_fsync, fd);
}

static int
disguise(int rc, struct statfs *stat)
{
	uint64_t fsid = FSID;

	if (rc == 0 && stat->f_type == FUSE_MAGIC && stat->f_namelen == SLOWFS_NAME_MAX) {
		stat->f_type = LUSTRE_MAGIC;
		stat->f_namelen = 255;
		memcpy(&stat->f_fsid, &fsid, sizeof(stat->f_fsid));
	}
	return rc;
}

int
fstatfs(int fd, struct statfs *stat)
{
	return disguise(syscall(SYS_fstatfs, fd, stat), stat);
}

int
statfs(const char *path, struct statfs *stat)
{
	return disguise(syscall(SYS_statfs, path, stat), stat);
}

_Static_assert(sizeof(struct statfs) == sizeof(struct statfs64), "statfs64 is another structure here");

int
fstatfs64(int fd, struct statfs64 *stat)
{
	return fstatfs(fd, (struct statfs *)stat);
}

int
statfs64(const char *path, struct statfs64 *stat)
{
	return statfs(path, (struct statfs *)stat);
}

/*
 * A second mount of a Lustre has options of its own; one of a slowfs (mount --bind) has not. So a mount point whose name ends
 * with -localflock has that option here. The mount point is the fifth word of a line of mountinfo.
 */
static const char *
option_of_mount(const char *line, const char *option)
{
	static const char suffix[] = "-localflock";
	char point[4096] = "";
	size_t length;

	if (sscanf(line, "%*s %*s %*s %*s %4095s", point) != 1) {
		return option;
	}
	length = strlen(point);
	if (length < strlen(suffix) || strcmp(point + length - strlen(suffix), suffix) != 0) {
		return option;
	}
	return "localflock ";
}

/*
 * Prints a line of a list of mounts as Lustre's. slowfs calls its source "slowfs:OPTION"; in mountinfo the filesystem's type
 * stands before the source, in mounts the mount point stands between the two.
 */
static void
print_mount(FILE *out, const char *line)
{
	const char *source = strstr(line, "slowfs:");
	const char *type = strstr(line, " - fuse slowfs:"), *option, *rest;
	int length;

	if (source == NULL) {
		fputs(line, out);
		return;
	}
	option = source + strlen("slowfs:");
	length = strcspn(option, " ");
	if (type != NULL) {
		option = option_of_mount(line, option);
		length = strcspn(option, " ");
		fprintf(out, "%.*s - lustre 127.0.0.1@tcp:/standin rw,%.*s,checksum,lazystatfs\n", (int)(type - line), line,
			length, option);
	} else if (source == line && (rest = strstr(line, " fuse ")) != NULL) {
		const char *mountpoint = option + length;

		fprintf(out, "127.0.0.1@tcp:/standin%.*s lustre rw,%.*s,checksum,lazystatfs 0 0\n", (int)(rest - mountpoint),
			mountpoint, length, option);
	} else {
		fputs(line, out);
	}
}

static int
is_list_of_mounts(const char *path)
{
	const char *name = strrchr(path, '/');

	return strncmp(path, "/proc/", 6) == 0 && (strcmp(name, "/mountinfo") == 0 || strcmp(name, "/mounts") == 0);
}

static int
open_mounts(const char *path)
{
	char *line = NULL;
	size_t size = 0;
	int from = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0), to, copy;
	FILE *in, *out;

	if (from < 0) {
		return -1;
	}
	to = memfd_create("mounts", MFD_CLOEXEC);
	copy = to < 0 ? -1 : fcntl(to, F_DUPFD_CLOEXEC, 0);
	in = fdopen(from, "r");
	out = copy < 0 ? NULL : fdopen(copy, "w");
	if (in == NULL || out == NULL) {
		abort();
	}
	while (getline(&line, &size, in) > 0) {
		print_mount(out, line);
	}
	free(line);
	fclose(in);
	fclose(out);
	lseek(to, 0, SEEK_SET);
	return to;
}

/*
 * What a Lustre client shows of itself below /proc/fs/lustre is in the folder $STANDIN_PROC, if that is set. The answer is valid
 * until the next call in the same thread.
 */
static const char *
in_proc(const char *path)
{
	static const char prefix[] = "/proc/fs/lustre";
	static __thread char other[4096];
	const char *folder = getenv("STANDIN_PROC");

	if (folder == NULL || strncmp(path, prefix, strlen(prefix)) != 0) {
		return path;
	}
	snprintf(other, sizeof(other), "%s%s", folder, path + strlen(prefix));
	return other;
}

DIR *
opendir(const char *path)
{
	int fd = syscall(SYS_openat, AT_FDCWD, in_proc(path), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);

	return fd < 0 ? NULL : fdopendir(fd);
}

static int
open_any(int dir, const char *path, int flags, mode_t mode)
{
	path = in_proc(path);
	if ((flags & O_ACCMODE) == O_RDONLY && is_list_of_mounts(path)) {
		return open_mounts(path);
	}
	return syscall(SYS_openat, dir, path, flags, mode);
}

#define MODE(flags, mode)                                        \
	do {                                                     \
		if ((flags) & (O_CREAT | __O_TMPFILE)) {         \
			va_list args;                            \
			va_start(args, flags);                   \
			mode = va_arg(args, mode_t);             \
			va_end(args);                            \
		}                                                \
	} while (0)

int
open(const char *path, int flags, ...)
{
	mode_t mode = 0;

	MODE(flags, mode);
	return open_any(AT_FDCWD, path, flags, mode);
}

int
open64(const char *path, int flags, ...)
{
	mode_t mode = 0;

	MODE(flags, mode);
	return open_any(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

int
openat(int dir, const char *path, int flags, ...)
{
	mode_t mode = 0;

	MODE(flags, mode);
	return open_any(dir, path, flags, mode);
}

int
openat64(int dir, const char *path, int flags, ...)
{
	mode_t mode = 0;

	MODE(flags, mode);
	return open_any(dir, path, flags | O_LARGEFILE, mode);
}
