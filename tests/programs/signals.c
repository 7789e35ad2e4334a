/* Counts SIGUSR1, and tells the count to whoever asks.
 *
 * usage: signals [PORT]
 * Each line is answered with `COUNT TOTAL TEXT` as epoll_echo does; `signals` is answered `signals N`.
 * SIGTERM is caught: the program then prints `ended by SIGTERM` and leaves with status 9.
 */
#include "guest.h"
#include <poll.h>

#define CONNECTIONS_MAX 64

static volatile sig_atomic_t received, ending;

static void on_usr1(int signal_number) {
    (void)signal_number;
    received++;
}

static void on_term(int signal_number) {
    (void)signal_number;
    ending = 1;
}

static struct {
    unsigned long count;
    size_t length;
    char line[65536];
} connections[CONNECTIONS_MAX];
static struct pollfd polled[CONNECTIONS_MAX];
static unsigned long total;

static void answer(int i, const char *line) {
    static char reply[65536 + 100];
    int length;
    connections[i].count++;
    total++;
    if (strcmp(line, "signals") == 0)
        length = snprintf(reply, sizeof reply, "%lu %lu signals %d\n", connections[i].count, total, (int)received);
    else if (strcmp(line, "pid") == 0)
        length = snprintf(reply, sizeof reply, "%lu %lu pid %d\n", connections[i].count, total, (int)getpid());
    else
        length = snprintf(reply, sizeof reply, "%lu %lu %s\n", connections[i].count, total, line);
    write_all(polled[i].fd, reply, (size_t)length);
}

static int serve(int i) {
    char *line = connections[i].line;
    ssize_t n = read(polled[i].fd, line + connections[i].length, sizeof connections[i].line - connections[i].length);
    if (n < 0 && errno == EINTR) return 1;
    if (n <= 0) return 0;
    connections[i].length += (size_t)n;
    char *end;
    while ((end = memchr(line, '\n', connections[i].length))) {
        *end = 0;
        answer(i, line);
        size_t used = (size_t)(end - line) + 1;
        memmove(line, end + 1, connections[i].length - used);
        connections[i].length -= used;
    }
    return 1;
}

int main(int argc, char **argv) {
    struct sigaction action = {.sa_handler = on_usr1, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
    action.sa_handler = on_term;
    CHECK(sigaction(SIGTERM, &action, NULL) == 0);
    for (int i = 0; i < CONNECTIONS_MAX; i++) polled[i] = (struct pollfd){.fd = -1, .events = POLLIN};
    polled[0].fd = listen_tcp(argc > 1 ? atoi(argv[1]) : 0);
    while (!ending) {
        int n = poll(polled, CONNECTIONS_MAX, 1000);
        if (n < 0) {
            CHECK(errno == EINTR);
            continue;
        }
        for (int i = 1; i < CONNECTIONS_MAX; i++) {
            if (polled[i].fd < 0 || polled[i].revents == 0 || serve(i)) continue;
            close(polled[i].fd);
            polled[i].fd = -1;
        }
        if (polled[0].revents == 0) continue;
        int fd = accept(polled[0].fd, NULL, NULL);
        if (fd < 0) continue;
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        int slot = 1;
        while (slot < CONNECTIONS_MAX && polled[slot].fd >= 0) slot++;
        CHECK(slot < CONNECTIONS_MAX);
        polled[slot] = (struct pollfd){.fd = fd, .events = POLLIN};
        connections[slot].count = connections[slot].length = 0;
    }
    say("ended by SIGTERM\n");
    return 9;
}
