/* Keeps what it is told in files, and answers `COUNT` when it has.
 *
 * Each line is appended to the file `ledger`, through a descriptor of its own; goes through a pipe that is held from the
 * start and comes back as it was; and the count so far is written over the one before in the file `count`, through a duplicate of a
 * descriptor that is held from the start.
 */
#include "guest.h"
#include <poll.h>

#define MOST 64

static int pipe_ends[2], count_fd;
static unsigned long count;

static void keep(const char *line, size_t length) {
    char back[256];
    CHECK(length < sizeof back);
    write_all(pipe_ends[1], line, length);
    CHECK(read(pipe_ends[0], back, sizeof back) == (ssize_t)length && memcmp(back, line, length) == 0);
    int fd = open("ledger", O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    CHECK(write(fd, line, length) == (ssize_t)length);
    CHECK(close(fd) == 0);
    count++;
    int length_of_count = snprintf(back, sizeof back, "%020lu\n", count);
    CHECK((fd = dup(count_fd)) >= 0);
    CHECK(pwrite(fd, back, (size_t)length_of_count, 0) == length_of_count);
    CHECK(close(fd) == 0);
}

int main(int argc, char **argv) {
    struct pollfd polled[MOST + 1];
    char in[MOST + 1][256], reply[32];
    size_t used[MOST + 1] = {0};
    int n = 1;
    CHECK(pipe(pipe_ends) == 0);
    CHECK((count_fd = open("count", O_RDWR | O_CREAT | O_CLOEXEC, 0600)) >= 0);
    polled[0] = (struct pollfd){.fd = listen_tcp(argc > 1 ? atoi(argv[1]) : 0), .events = POLLIN};
    for (;;) {
        if (poll(polled, (nfds_t)n, -1) < 0) {
            CHECK(errno == EINTR);
            continue;
        }
        for (int i = n - 1; i >= 1; i--) {
            if (!polled[i].revents) continue;
            ssize_t got = recv(polled[i].fd, in[i] + used[i], sizeof in[i] - used[i], 0);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) {
                close(polled[i].fd);
                n--;
                polled[i] = polled[n];
                used[i] = used[n];
                memmove(in[i], in[n], sizeof in[i]);
                continue;
            }
            used[i] += (size_t)got;
            CHECK(used[i] < sizeof in[i]);
            char *end = memchr(in[i], '\n', used[i]);
            if (!end) continue;
            /* A client sends the next line when it has its answer. */
            CHECK((size_t)(end - in[i]) + 1 == used[i]);
            keep(in[i], used[i]);
            used[i] = 0;
            int length = snprintf(reply, sizeof reply, "%lu\n", count);
            /* A connection that is gone is seen at the next look. */
            (void)!send(polled[i].fd, reply, (size_t)length, MSG_NOSIGNAL);
        }
        if (n <= MOST && (polled[0].revents & POLLIN)) {
            int fd = accept4(polled[0].fd, NULL, NULL, SOCK_CLOEXEC);
            if (fd >= 0) {
                polled[n] = (struct pollfd){.fd = fd, .events = POLLIN};
                used[n++] = 0;
            }
        }
    }
}
