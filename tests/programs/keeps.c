/* Line server that does with descriptors, limits and locks what it is told, one thread, poll.
 *
 * usage: keeps PORT
 * `TEXT` is answered with `COUNT TOTAL TEXT`, and with a result for
 * `lock KIND FILE START LENGTH`: takes a lock for writing; KIND is `posix`, `end` (posix, START from the file's end), `ofd` or
 *   `whole` (flock). `ok`, or what the kernel says. FILE stays open from its first mention on, and is mapped.
 * `unlock KIND FILE START LENGTH`: gives it back.
 * `twin FILE`: opens and closes the file once more: with that go all of its posix locks.
 * `make N`: opens N eventfds, each with a number of its own; `ok`, or what the kernel says.
 * `count`: how many of them there are, when each has its number.
 * `drop`: closes them all.
 * `limit N`: at most N descriptors from now on, soft and hard.
 * `fill`: copies standard error until there is no number left; the highest. They are closed again.
 */
#include "guest.h"
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>

#define CONNECTIONS_MAX 16
#define FILES_MAX 8
#define MADE_MAX 8192

static struct pollfd polled[CONNECTIONS_MAX];
static struct {
    unsigned long count;
    size_t length;
    char line[4096];
} connections[CONNECTIONS_MAX];
static struct {
    int fd;
    char name[256];
} files[FILES_MAX];
static int made[MADE_MAX], made_count;
static unsigned long total;

static const char *result_of(int r) { return r == 0 ? "ok" : strerror(errno); }

static int file_of(const char *name) {
    int i = 0;
    for (; files[i].name[0]; i++)
        if (strcmp(files[i].name, name) == 0) return files[i].fd;
    CHECK(i + 1 < FILES_MAX && strlen(name) < sizeof files[i].name);
    CHECK((files[i].fd = open(name, O_RDWR | O_CLOEXEC)) >= 0);
    CHECK(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, files[i].fd, 0) != MAP_FAILED);
    strcpy(files[i].name, name);
    return files[i].fd;
}

static const char *lock(int fd, const char *kind, int take, long start, long length) {
    if (strcmp(kind, "whole") == 0) return result_of(flock(fd, take ? LOCK_EX | LOCK_NB : LOCK_UN));
    int at_end = strcmp(kind, "end") == 0;
    struct flock lock = {.l_type = take ? F_WRLCK : F_UNLCK, .l_whence = at_end ? SEEK_END : SEEK_SET};
    lock.l_start = start;
    lock.l_len = length;
    return result_of(fcntl(fd, strcmp(kind, "ofd") == 0 ? F_OFD_SETLK : F_SETLK, &lock));
}

static const char *make(int n) {
    CHECK(made_count + n <= MADE_MAX);
    for (; n > 0; n--, made_count++)
        if ((made[made_count] = eventfd((unsigned)made_count + 1, EFD_NONBLOCK | EFD_CLOEXEC)) < 0) return result_of(-1);
    return "ok";
}

static void count_made(void) {
    for (int i = 0; i < made_count; i++) {
        uint64_t number = 0;
        if (read(made[i], &number, sizeof number) != sizeof number || number != (uint64_t)i + 1)
            fail("eventfd %d has %lu", i, (unsigned long)number);
        CHECK(write(made[i], &number, sizeof number) == sizeof number);
    }
}

static int fill(void) {
    static int filled[65536];
    int n = 0;
    while ((filled[n] = dup(2)) >= 0) n++;
    CHECK(errno == EMFILE && n > 0);
    int highest = filled[n - 1];
    for (int i = 0; i < n; i++) CHECK(close(filled[i]) == 0);
    return highest;
}

static void answer(int i, const char *line) {
    char result[256] = "", kind[16], name[256];
    long start, length;
    int n;
    if (sscanf(line, "lock %15s %255s %ld %ld", kind, name, &start, &length) == 4)
        snprintf(result, sizeof result, " %s", lock(file_of(name), kind, 1, start, length));
    else if (sscanf(line, "unlock %15s %255s %ld %ld", kind, name, &start, &length) == 4)
        snprintf(result, sizeof result, " %s", lock(file_of(name), kind, 0, start, length));
    else if (sscanf(line, "twin %255s", name) == 1)
        CHECK(close(open(name, O_RDONLY)) == 0);
    else if (sscanf(line, "make %d", &n) == 1)
        snprintf(result, sizeof result, " %s", make(n));
    else if (strcmp(line, "count") == 0) {
        count_made();
        snprintf(result, sizeof result, " %d", made_count);
    } else if (strcmp(line, "drop") == 0)
        while (made_count > 0) CHECK(close(made[--made_count]) == 0);
    else if (sscanf(line, "limit %d", &n) == 1) {
        struct rlimit limit = {.rlim_cur = (rlim_t)n, .rlim_max = (rlim_t)n};
        CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    } else if (strcmp(line, "fill") == 0)
        snprintf(result, sizeof result, " %d", fill());
    static char reply[8192];
    n = snprintf(reply, sizeof reply, "%lu %lu %s%s\n", ++connections[i].count, ++total, line, result);
    write_all(polled[i].fd, reply, (size_t)n);
}

/* Reads once and answers the whole lines. Returns 0 at the end of the connection. */
static int serve(int i) {
    char *in = connections[i].line;
    ssize_t n = read(polled[i].fd, in + connections[i].length, sizeof connections[i].line - connections[i].length);
    if (n < 0 && errno == EINTR) return 1;
    if (n <= 0) return 0;
    connections[i].length += (size_t)n;
    char *end;
    while ((end = memchr(in, '\n', connections[i].length))) {
        *end = 0;
        answer(i, in);
        size_t used = (size_t)(end - in) + 1;
        memmove(in, end + 1, connections[i].length - used);
        connections[i].length -= used;
    }
    return 1;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    for (int i = 0; i < CONNECTIONS_MAX; i++) polled[i] = (struct pollfd){.fd = -1, .events = POLLIN};
    polled[0].fd = listen_tcp(atoi(argv[1]));
    CHECK(signal(SIGPIPE, SIG_IGN) != SIG_ERR);
    notify("READY=1");
    for (;;) {
        if (poll(polled, CONNECTIONS_MAX, -1) < 0) {
            CHECK(errno == EINTR);
            continue;
        }
        for (int i = 1; i < CONNECTIONS_MAX; i++) {
            if (polled[i].fd < 0 || polled[i].revents == 0 || serve(i)) continue;
            CHECK(close(polled[i].fd) == 0);
            polled[i].fd = -1;
        }
        if (polled[0].revents == 0) continue;
        int i = 1;
        while (i < CONNECTIONS_MAX && polled[i].fd >= 0) i++;
        CHECK(i < CONNECTIONS_MAX);
        polled[i].fd = accept_tcp(polled[0].fd);
        connections[i].count = connections[i].length = 0;
    }
}
