/* Line server that executes itself when it is told to, and goes on with its connections.
 *
 * usage: successor PORT
 * Each line `TEXT` is answered with `COUNT TOTAL TEXT`. `exec` makes it execute itself after the answer; `private` has its
 * connection closed by that.
 */
#include "guest.h"
#include <poll.h>

#define CONNECTIONS_MAX 64
#define LINE_MAX_BYTES 65536

static struct pollfd polled[CONNECTIONS_MAX];
static struct {
    unsigned long count;
    size_t length;
    char line[LINE_MAX_BYTES];
} connections[CONNECTIONS_MAX];
static unsigned long total;
static int successor_wanted;

static void answer(int i, const char *line, size_t length) {
    answer_line(polled[i].fd, ++connections[i].count, ++total, line, length);
    if (strcmp(line, "exec") == 0) successor_wanted = 1;
    if (strcmp(line, "private") == 0) CHECK(fcntl(polled[i].fd, F_SETFD, FD_CLOEXEC) == 0);
}

/* Reads once and answers the whole lines. Returns 0 at the end of the connection. */
static int serve(int i) {
    char *in = connections[i].line;
    ssize_t n = read(polled[i].fd, in + connections[i].length, LINE_MAX_BYTES - 1 - connections[i].length);
    if (n < 0 && errno == EINTR) return 1;
    if (n <= 0) return 0;
    connections[i].length += (size_t)n;
    char *end;
    while ((end = memchr(in, '\n', connections[i].length))) {
        size_t length = (size_t)(end - in);
        *end = 0;
        answer(i, in, length);
        memmove(in, end + 1, connections[i].length - length - 1);
        connections[i].length -= length + 1;
    }
    return 1;
}

/* What the successor has to know is in its arguments: numbers and counts, and the part of a line that has come. */
static void succeed(void) {
    static char texts[CONNECTIONS_MAX][64];
    char *argv[2 * CONNECTIONS_MAX + 3] = {"successor", texts[0]};
    int n = 2;
    snprintf(texts[0], sizeof texts[0], "=%d %lu", polled[0].fd, total);
    for (int i = 1; i < CONNECTIONS_MAX; i++) {
        if (polled[i].fd < 0 || fcntl(polled[i].fd, F_GETFD) & FD_CLOEXEC) continue;
        snprintf(texts[i], sizeof texts[i], "%d %lu", polled[i].fd, connections[i].count);
        connections[i].line[connections[i].length] = 0;
        argv[n++] = texts[i];
        argv[n++] = connections[i].line;
    }
    execv("/proc/self/exe", argv);
    fail("execv");
}

static void begin(int argc, char **argv) {
    for (int i = 0; i < CONNECTIONS_MAX; i++) polled[i] = (struct pollfd){.fd = -1, .events = POLLIN};
    CHECK(argc >= 2);
    if (sscanf(argv[1], "=%d %lu", &polled[0].fd, &total) != 2) {
        polled[0].fd = listen_tcp(atoi(argv[1]));
        CHECK(fcntl(polled[0].fd, F_SETFD, 0) == 0);
        notify("READY=1");
        return;
    }
    for (int i = 1; 2 * i + 1 < argc; i++) {
        CHECK(sscanf(argv[2 * i], "%d %lu", &polled[i].fd, &connections[i].count) == 2);
        connections[i].length = strlen(argv[2 * i + 1]);
        memcpy(connections[i].line, argv[2 * i + 1], connections[i].length);
    }
}

int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(signal(SIGPIPE, SIG_IGN) != SIG_ERR);
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
        if (polled[0].revents != 0) {
            int i = 1;
            while (i < CONNECTIONS_MAX && polled[i].fd >= 0) i++;
            CHECK(i < CONNECTIONS_MAX);
            polled[i].fd = accept_tcp(polled[0].fd);
            connections[i].count = connections[i].length = 0;
        }
        if (successor_wanted) succeed();
    }
}
