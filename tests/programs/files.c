/* Files and directories, used so that a call carried out twice, or not at all, is noticed. */
#include "guest.h"
#include <dirent.h>
#include <sys/stat.h>

static int entries(const char *path) {
    DIR *directory = opendir(path);
    CHECK(directory != NULL);
    int count = 0;
    struct dirent *entry;
    while ((entry = readdir(directory)))
        if (entry->d_name[0] != '.') count++;
    CHECK(closedir(directory) == 0);
    return count;
}

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0640);
    if (fd < 0) fail("create %s", path);
    CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    CHECK(close(fd) == 0);
}

static void expect(const char *path, const char *text) {
    char buffer[256];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail("open %s", path);
    ssize_t n = read(fd, buffer, sizeof buffer);
    if (n != (ssize_t)strlen(text) || memcmp(buffer, text, (size_t)n) != 0) fail("%s holds something else", path);
    CHECK(close(fd) == 0);
}

int main(void) {
    int appended = open("appended", O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0644);
    int table = open("table", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    CHECK(appended >= 0 && table >= 0);
    say("ready 0\n");
    off_t size = 0;
    long round = 0;
    while (!stop_requested()) {
        round++;
        char dir[64], a[128], b[128], text[64];
        snprintf(dir, sizeof dir, "dir.%ld", round);
        snprintf(a, sizeof a, "%s/a", dir);
        snprintf(b, sizeof b, "%s/b", dir);
        int length = snprintf(text, sizeof text, "round %ld\n", round);

        CHECK(mkdir(dir, 0755) == 0);
        put(a, text);
        CHECK(open(a, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644) < 0 && errno == EEXIST);
        CHECK(entries(dir) == 1);
        CHECK(rename(a, b) == 0);
        CHECK(rename(a, b) < 0 && errno == ENOENT);
        expect(b, text);
        CHECK(link(b, a) == 0);
        struct stat info;
        CHECK(stat(a, &info) == 0 && info.st_nlink == 2 && info.st_size == length);
        CHECK(entries(dir) == 2);
        CHECK(unlink(a) == 0);
        CHECK(symlink("b", a) == 0);
        expect(a, text);
        CHECK(truncate(b, 5) == 0);
        expect(a, "round");

        CHECK(write(appended, text, (size_t)length) == length);
        size += length;
        CHECK(fstat(appended, &info) == 0);
        if (info.st_size != size) fail("round %ld: appended is %ld bytes, not %ld", round, (long)info.st_size, (long)size);
        CHECK(lseek(appended, 0, SEEK_CUR) == size);

        uint64_t slot = 0, want = (uint64_t)(round > 16 ? round - 16 : 0);
        off_t at = (off_t)(round % 16) * 8;
        if (pread(table, &slot, sizeof slot, at) == 0) slot = 0;
        if (slot != want) fail("round %ld: the slot holds %llu", round, (unsigned long long)slot);
        slot = (uint64_t)round;
        CHECK(pwrite(table, &slot, sizeof slot, at) == sizeof slot);
        CHECK(lseek(table, 0, SEEK_CUR) == 0);

        /* Only the newest eight directories stay. */
        if (round > 8) {
            snprintf(dir, sizeof dir, "dir.%ld", round - 8);
            snprintf(a, sizeof a, "%s/a", dir);
            snprintf(b, sizeof b, "%s/b", dir);
            CHECK(unlink(a) == 0 && unlink(b) == 0 && rmdir(dir) == 0);
            CHECK(rmdir(dir) < 0 && errno == ENOENT);
        }
        say("round %ld\n", round);
    }
    say("ok %ld\n", round);
    return 0;
}
