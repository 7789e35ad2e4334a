/* Line server with workers: a parent that only starts them again and talks to who asks it, as such servers do.
 *
 * usage: prefork PORT WORKERS
 * Workers accept at PORT, each serves one connection at a time; the parent accepts at PORT + 1. Each line `TEXT` is answered with
 * `COUNT TOTAL TEXT`, TOTAL being the answering process's; `pid` with the process id appended.
 * The parent answers `ended` with the numbers of children that were killed and that ended otherwise than well; `child TEXT` is answered by a child
 * that has the parent's connection.
 */
#include "guest.h"
#include <poll.h>
#include <sys/wait.h>

#define CONNECTIONS_MAX 64
#define LINE_MAX_BYTES 65536
#define WORKERS_MAX 8

struct connection {
    unsigned long count;
    size_t length;
    char line[LINE_MAX_BYTES];
};

static struct pollfd polled[CONNECTIONS_MAX];
static struct connection connections[CONNECTIONS_MAX];
static unsigned long total, killed, failed;

static void on_child(int signal_number) { (void)signal_number; }

typedef void answer_fn(struct connection *, int fd, const char *line, size_t length);

static void answer(struct connection *c, int fd, const char *line, size_t length) {
    answer_line(fd, ++c->count, ++total, line, length);
}

static void parents_answer(struct connection *c, int fd, const char *line, size_t length) {
    if (strcmp(line, "ended") == 0) {
        char reply[100];
        int n = snprintf(reply, sizeof reply, "%lu %lu ended %lu %lu\n", ++c->count, ++total, killed, failed);
        write_all(fd, reply, (size_t)n);
    } else if (strncmp(line, "child ", 6) == 0) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            answer(c, fd, line, length);
            _exit(0);
        }
        c->count++, total++;
    } else {
        answer(c, fd, line, length);
    }
}

/* Reads once and answers the whole lines. Returns 0 at the end of the connection. */
static int serve(struct connection *c, int fd, answer_fn *answer) {
    ssize_t n = read(fd, c->line + c->length, LINE_MAX_BYTES - 1 - c->length);
    if (n < 0 && errno == EINTR) return 1;
    if (n <= 0) return 0;
    c->length += (size_t)n;
    char *end;
    while ((end = memchr(c->line, '\n', c->length))) {
        size_t length = (size_t)(end - c->line);
        *end = 0;
        answer(c, fd, c->line, length);
        memmove(c->line, end + 1, c->length - length - 1);
        c->length -= length + 1;
    }
    return 1;
}

static pid_t start_worker(int listener) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child > 0) return child;
    /* What is the parent's own ends with the parent's last copy. */
    for (int i = 0; i < CONNECTIONS_MAX; i++)
        if (polled[i].fd >= 0) CHECK(close(polled[i].fd) == 0);
    total = 0;
    for (;;) {
        int fd = accept_tcp(listener);
        struct connection *c = &connections[0];
        c->count = c->length = 0;
        while (serve(c, fd, answer)) {}
        CHECK(close(fd) == 0);
    }
}

/* Children that have ended are counted, and workers among them started again. */
static void bury(int listener, pid_t *workers, int count) {
    int status;
    for (pid_t ended; (ended = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) killed++;
        else if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) failed++;
        for (int i = 0; i < count; i++)
            if (workers[i] == ended) workers[i] = start_worker(listener);
    }
}

static void take_new(void) {
    int i = 1;
    while (i < CONNECTIONS_MAX && polled[i].fd >= 0) i++;
    CHECK(i < CONNECTIONS_MAX);
    polled[i].fd = accept_tcp(polled[0].fd);
    connections[i].count = connections[i].length = 0;
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    int count = atoi(argv[2]);
    pid_t workers[WORKERS_MAX];
    CHECK(count <= WORKERS_MAX);
    for (int i = 0; i < CONNECTIONS_MAX; i++) polled[i] = (struct pollfd){.fd = -1, .events = POLLIN};
    int listener = listen_tcp(atoi(argv[1]));
    polled[0].fd = listen_tcp(atoi(argv[1]) + 1);
    struct sigaction action = {.sa_handler = on_child};
    CHECK(sigaction(SIGCHLD, &action, NULL) == 0 && signal(SIGPIPE, SIG_IGN) != SIG_ERR);
    sigset_t open, child;
    CHECK(sigemptyset(&child) == 0 && sigaddset(&child, SIGCHLD) == 0);
    CHECK(sigprocmask(SIG_BLOCK, &child, &open) == 0);
    for (int i = 0; i < count; i++) workers[i] = start_worker(listener);
    notify("READY=1");
    for (;;) {
        int n = ppoll(polled, CONNECTIONS_MAX, NULL, &open);
        CHECK(n >= 0 || errno == EINTR);
        bury(listener, workers, count);
        for (int i = 1; n > 0 && i < CONNECTIONS_MAX; i++) {
            if (polled[i].fd < 0 || polled[i].revents == 0 || serve(&connections[i], polled[i].fd, parents_answer)) continue;
            CHECK(close(polled[i].fd) == 0);
            polled[i].fd = -1;
        }
        if (n > 0 && polled[0].revents != 0) take_new();
    }
}
