/* Stands between a program and the C library, and has calls fail as other file systems let them.

   FAULTS holds words: CALL=ERRNO fails a call (link, flock, rename, unlink, tmpfile), CALL=stall
   keeps it waiting for 10 s the first time (link, write, read for opening a file that is there), names=fat and names=short refuse what FAT or an encrypted folder cannot hold, free=0 knows no free space,
   close=ERRNO is that of a file that was open to be read and written, as on NFS.
   types=unknown has listings of a folder tell no kinds, as of XFS without ftype and of some FUSE.
   size=N makes a write beyond N bytes fail as on FAT, full=N as on a full disk.

   cc -shared -fPIC -o faulty_disk.so faulty_disk.c -ldl */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <unistd.h>

static const char *setting(const char *name) {
    static __thread char found[64];
    const char *faults = getenv("FAULTS");
    size_t length = strlen(name);
    for (; faults && *faults; faults += strcspn(faults, " "), faults += strspn(faults, " ")) {
        if (!strncmp(faults, name, length) && faults[length] == '=') {
            size_t size = strcspn(faults + length + 1, " ");
            if (size >= sizeof found) return NULL;
            memcpy(found, faults + length + 1, size);
            found[size] = 0;
            return found;
        }
    }
    return NULL;
}

static int fails(const char *call) {
    static int has_stalled;
    const char *number = setting(call);
    if (!number) return 0;
    if (!strcmp(number, "stall")) return has_stalled++ || sleep(10), 0;
    errno = atoi(number);
    return 1;
}

static int is_bad_name(const char *path) {
    const char *kind = setting("names"), *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;
    if (!kind || !strncmp(path, "/proc/", 6)) return 0;
    if (!strcmp(kind, "fat") && strpbrk(name, ":*?<>|\"\\")) return errno = EINVAL, 1;
    if (!strcmp(kind, "short") && strlen(name) > 143) return errno = ENAMETOOLONG, 1;
    return 0;
}

#define NEXT(call) ((__typeof__(&call))dlsym(RTLD_NEXT, #call))

int linkat(int from, const char *source, int to, const char *target, int flags) {
    if (is_bad_name(target) || fails("link")) return -1;
    return NEXT(linkat)(from, source, to, target, flags);
}

int link(const char *source, const char *target) {
    if (fails("link")) return -1;
    return NEXT(link)(source, target);
}

int rename(const char *source, const char *target) {
    if (fails("rename")) return -1;
    return NEXT(rename)(source, target);
}

int renameat(int from, const char *source, int to, const char *target) {
    if (is_bad_name(target) || fails("rename")) return -1;
    return NEXT(renameat)(from, source, to, target);
}

int unlinkat(int folder, const char *path, int flags) {
    if (fails("unlink")) return -1;
    return NEXT(unlinkat)(folder, path, flags);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    if (is_bad_name(path)) return -1;
    return NEXT(mkdirat)(folder, path, mode);
}

int flock(int file, int operation) {
    if (fails("flock")) return -1;
    return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(file, operation);
}

int openat64(int folder, const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = va_arg(arguments, mode_t);
    va_end(arguments);
    if (!(flags & (O_DIRECTORY | O_CREAT)) && fails("read")) return -1;
    if ((flags & O_TMPFILE) == O_TMPFILE ? fails("tmpfile") : (flags & O_CREAT) && is_bad_name(path))
        return -1;
    return NEXT(openat64)(folder, path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = va_arg(arguments, mode_t);
    va_end(arguments);
    return openat64(folder, path, flags, mode);
}

ssize_t write(int file, const void *data, size_t size) {
    off_t end = lseek(file, 0, SEEK_CUR) + (off_t)size; /* less than size where there is no place */
    const char *limit;
    if (size > 65536 && fails("write")) return -1; /* no line of the log */
    if ((limit = setting("size")) && end >= (off_t)size && end > atoll(limit)) return errno = EFBIG, -1;
    if ((limit = setting("full")) && end >= (off_t)size && end > atoll(limit)) return errno = ENOSPC, -1;
    return NEXT(write)(file, data, size);
}

int close(int file) {
    int is_written = setting("close") && (fcntl(file, F_GETFL) & O_ACCMODE) == O_RDWR && lseek(file, 0, SEEK_CUR) >= 0;
    int status = NEXT(close)(file);
    return is_written && fails("close") ? -1 : status;
}

struct dirent64 *readdir64(DIR *folder) {
    struct dirent64 *entry = NEXT(readdir64)(folder);
    if (entry && setting("types")) entry->d_type = DT_UNKNOWN;
    return entry;
}

struct dirent *readdir(DIR *folder) {
    struct dirent *entry = NEXT(readdir)(folder);
    if (entry && setting("types")) entry->d_type = DT_UNKNOWN;
    return entry;
}

int fstatvfs64(int file, struct statvfs64 *found) {
    int status = NEXT(fstatvfs64)(file, found);
    if (setting("free")) found->f_blocks = found->f_bavail = found->f_bfree = 0;
    return status;
}

int fstatvfs(int file, struct statvfs *found) {
    int status = NEXT(fstatvfs)(file, found);
    if (setting("free")) found->f_blocks = found->f_bavail = found->f_bfree = 0;
    return status;
}
