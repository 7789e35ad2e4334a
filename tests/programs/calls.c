/* What one system call costs, for each of a few: prints `NAME NANOSECONDS`, then `done`.
 *
 * The clock is read once before and once after as many calls as can be made in a row: all of them where nothing
 * is used up, else as many as the socket's buffer holds data or room for. What the readings themselves cost is
 * measured first and taken off. Every result is checked. Before each measurement the call is made a few hundred
 * times.
 *
 * usage: calls COUNT
 */
#include "guest.h"
#include <sys/epoll.h>

enum { WARM_UP = 300, PAGE = 4096, ROW_MAX = 256 };

static int near_end, far_end, ready_set;
static char page[PAGE];
static char many[ROW_MAX * PAGE];

static void make_sockets(void) {
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
    near_end = ends[0];
    far_end = ends[1];
    /* More room makes longer rows; only root may have more than the system's limit. */
    int room = 4 << 20;
    for (int i = 0; i < 2; i++)
        if (setsockopt(ends[i], SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room) != 0)
            CHECK(setsockopt(ends[i], SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
}

/* Reads at `fd` whatever there is; returns how much. */
static long drain(int fd) {
    long all = 0;
    for (;;) {
        ssize_t n = read(fd, many, sizeof many);
        if (n < 0) {
            CHECK(errno == EAGAIN);
            return all;
        }
        CHECK(n > 0);
        all += n;
    }
}

/* How many writes of this size, at most ROW_MAX, fit into the socket. */
static long writes_that_fit(size_t size) {
    long row = 0;
    while (row < ROW_MAX && write(near_end, page, size) == (ssize_t)size) row++;
    CHECK(row > 0);
    CHECK(drain(far_end) == row * (long)size);
    return row;
}

static void call_getppid(long row) {
    static pid_t parent;
    if (parent == 0) parent = getppid();
    for (long i = 0; i < row; i++) CHECK(getppid() == parent);
}

static void call_clock_gettime(long row) {
    struct timespec now;
    for (long i = 0; i < row; i++) CHECK(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
}

static void call_epoll_wait(long row) {
    struct epoll_event event;
    for (long i = 0; i < row; i++) CHECK(epoll_wait(ready_set, &event, 1, -1) == 1);
}

static void call_read(long row, size_t size) {
    for (long i = 0; i < row; i++) CHECK(read(far_end, page, size) == (ssize_t)size);
}

static void call_write(long row, size_t size) {
    for (long i = 0; i < row; i++) CHECK(write(near_end, page, size) == (ssize_t)size);
}

static void read_1(long row) { call_read(row, 1); }
static void read_4k(long row) { call_read(row, PAGE); }
static void write_1(long row) { call_write(row, 1); }
static void write_4k(long row) { call_write(row, PAGE); }

static void fill(long bytes) {
    while (bytes > 0) {
        ssize_t n = write(near_end, many, bytes < (long)sizeof many ? (size_t)bytes : sizeof many);
        CHECK(n > 0);
        bytes -= n;
    }
}

/* Nanoseconds for one of `count` calls, made in rows. `moved` is what a call moves: read from the socket if
 * `reads`, written to it otherwise. */
static double measure(void (*calls)(long), long count, long row, long moved, int reads, double reading) {
    double total = 0;
    for (long made = -WARM_UP, now; made < count; made += now) {
        long left = made < 0 ? -made : count - made;
        now = left < row ? left : row;
        if (reads) fill(now * moved);
        double start = monotonic();
        calls(now);
        double end = monotonic();
        if (made >= 0) total += end - start - reading;
        if (moved && !reads) CHECK(drain(far_end) == now * moved);
    }
    return total / (double)count * 1e9;
}

int main(int argc, char **argv) {
    long count = argc > 1 ? atol(argv[1]) : 10000;
    CHECK(count > 0);
    say("ready 0\n");
    make_sockets();
    double reading = measure(call_clock_gettime, count, count, 0, 0, 0) / 1e9;
    say("clock_gettime %.1f\n", reading * 1e9);
    say("getppid %.1f\n", measure(call_getppid, count, count, 0, 0, reading));
    /* One byte at a time, 64 KiB are a row; they are there after one write. */
    say("read-1 %.1f\n", measure(read_1, count, 65536, 1, 1, reading));
    say("read-4096 %.1f\n", measure(read_4k, count, writes_that_fit(PAGE), PAGE, 1, reading));
    say("write-1 %.1f\n", measure(write_1, count, writes_that_fit(1), 1, 0, reading));
    say("write-4096 %.1f\n", measure(write_4k, count, writes_that_fit(PAGE), PAGE, 0, reading));
    ready_set = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    CHECK(ready_set >= 0 && epoll_ctl(ready_set, EPOLL_CTL_ADD, far_end, &event) == 0);
    fill(1);
    say("epoll_wait %.1f\n", measure(call_epoll_wait, count, count, 0, 0, reading));
    say("done\n");
    return 0;
}
